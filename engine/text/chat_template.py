"""ChatTemplate: messages to the text of a prompt, by the model's own Jinja template, as transformers renders it.

The template is the model owner's and is trusted to end; messages are a user's and are not: they are copied to plain
data, the sandbox is immutable, and output and time are bounded. `render` is pure and may run in the tokenizer pool.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, SupportsIndex, overload

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox

from engine.config import StartupError
from engine.request import RequestError
from engine.text.added_tokens import named_tokens, read_json
from engine.text.template_probe import PROBE_RENDER_SECONDS, find_shape
from engine.text.template_shape import REASONING_FIELDS, Message, TemplateShape, fit, plain, text_of

# The body limit is 8 MiB; a template that makes more than this of it is not rendering a conversation.
MAX_OUTPUT_CHARACTERS = 32 * 1024 * 1024
MAX_RENDER_SECONDS = 5.0
# Marks the place where a continued message ends; the trailing space shows whether the template trims.
_CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks training targets; to a server its body is plain template."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own declaration)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A scope of its own, so that `set` inside does not leak out: transformers renders it as a call block.
        return [jinja2.nodes.Scope(body)]


class _Deadline:
    """Raises RequestError when a rendering takes longer than so many seconds."""

    __slots__ = ("_end", "_seconds")

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._end = time.monotonic() + seconds

    def check(self) -> None:
        if time.monotonic() > self._end:
            raise RequestError(f"The chat template took longer than {self._seconds:g} s on these messages.")


class _Messages(list[Any]):
    """The conversation; looking at it checks the deadline, which bounds templates that are quadratic in it."""

    __slots__ = ("_deadline",)

    def __init__(self, messages: list[Any], deadline: _Deadline) -> None:
        super().__init__(messages)
        self._deadline = deadline

    def __iter__(self) -> Iterator[Any]:
        for message in super().__iter__():
            self._deadline.check()
            yield message

    @overload
    def __getitem__(self, index: SupportsIndex) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: Any) -> Any:
        self._deadline.check()
        return super().__getitem__(index)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes <, > and & for HTML, which models were not trained on."""
    if isinstance(value, Iterator):
        # What `map` and `select` make of a list.
        value = list(value)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _compile(environment: jinja2.Environment, source: str, origin: str) -> jinja2.Template:
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise StartupError(f"{origin}: chat template, line {error.lineno}: {error.message}") from None
    except (jinja2.TemplateError, RecursionError) as error:
        raise StartupError(f"{origin}: chat template: {error}") from None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise StartupError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise StartupError(f"{path}: not UTF-8 text") from None


def _from_field(value: Any, path: Path) -> dict[str, str]:
    """chat_template of a JSON file: one text, or a list of named ones."""
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, dict):
        value = [{"name": name, "template": text} for name, text in value.items()]
    if isinstance(value, list):
        try:
            named = {entry["name"]: entry["template"] for entry in value}
        except (KeyError, TypeError):
            named = {}
        if named and all(isinstance(text, str) for pair in named.items() for text in pair):
            return named
    raise StartupError(f"{path}: chat_template must be text or a list of objects with name and template")


def _find(directory: Path) -> tuple[dict[str, str], Path]:
    """The templates of a model directory by name. Files of their own go before fields, as in transformers."""
    named: dict[str, str] = {}
    file = directory / "chat_template.jinja"
    if file.is_file():
        named["default"] = _read_text(file)
    for extra in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        named[extra.stem] = _read_text(extra)
    if named:
        return named, file
    for path in (directory / "tokenizer_config.json", directory / "chat_template.json"):
        if path.is_file() and (value := read_json(path).get("chat_template")) is not None:
            return _from_field(value, path), path
    return {}, file


class ChatTemplate:
    """One model's template, or its named ones: tool_use where tools are given and there is one, else default.

    source: the text of the default one. shape, tool_shape: what conversations without and with tools have to look
    like; `render` gives them so.
    """

    def __init__(
        self, templates: dict[str, str], special_tokens: dict[str, str], origin: str = "chat template"
    ) -> None:
        if "default" not in templates and len(templates) > 1:
            names = ", ".join(sorted(templates))
            raise StartupError(f"{origin}: several chat templates ({names}) and none is named default")
        environment = _environment()
        self._sources = templates
        self._compiled = {name: _compile(environment, text, origin) for name, text in templates.items()}
        self._default = "default" if "default" in templates else next(iter(templates))
        self._special_tokens = dict(special_tokens)
        self.source = templates[self._default]
        self.shape = self._find_shape(with_tools=False)
        self.tool_shape = self._find_shape(with_tools=True)

    @classmethod
    def load(cls, directory: Path, override: str | None = None) -> ChatTemplate | None:
        """The template of a model directory, or `override`: a path, or the text itself (it holds a brace).

        None when the model has none. Raises StartupError naming the file.
        """
        if override is not None:
            return cls.given(override, named_tokens(directory))
        templates, path = _find(directory)
        if not templates:
            return None
        return cls(templates, named_tokens(directory), str(path))

    @classmethod
    def given(cls, template: str, special_tokens: dict[str, str]) -> ChatTemplate:
        """That of --chat-template: a path, or the text itself (it holds a brace). Raises StartupError."""
        if "{" in template:
            return cls({"default": template}, special_tokens, "--chat-template")
        return cls({"default": _read_text(Path(template))}, special_tokens, template)

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        kwargs: dict[str, Any] | None = None,
    ) -> str:
        """The prompt of a conversation, special tokens as text: encode it with add_special_tokens=False.

        kwargs: `chat_template_kwargs`, more variables for the template. Raises RequestError (400) with the
        template's own words when it refuses the messages, and when a bound is passed.
        """
        if not messages:
            raise RequestError("messages must hold at least one message", param="messages")
        if not continue_final_message:
            return self._render(messages, tools, add_generation_prompt, kwargs)
        if add_generation_prompt:
            raise RequestError(
                "continue_final_message and add_generation_prompt exclude each other: the first goes on with the "
                "last message, the second begins a new one",
                param="continue_final_message",
            )
        return self._continue(messages, tools, kwargs)

    def find_turn(
        self,
        prompt: str,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        kwargs: dict[str, Any] | None = None,
    ) -> int:
        """Where in `prompt`, which `render` made of the same arguments, the turn begins that the model goes on with.

        What lies behind is the template's own and a continued message of the assistant: nothing that a user or a tool
        said. It takes a second rendering, of the conversation without that turn.
        """
        before = messages
        if continue_final_message or not add_generation_prompt:
            if messages[-1].get("role") != "assistant":
                return len(prompt)
            before = messages[:-1]
        if not before:
            return 0
        try:
            bare = self._render(before, tools, False, kwargs)
        except RequestError:
            bare = prompt
        if bare != prompt:
            return _common_length(bare, prompt)
        # The template asks for an answer whatever it is told, or renders nothing else: behind the last text it stands.
        said = text_of(before[-1].get("content")).strip()
        place = prompt.rfind(said) if said else -1
        return len(prompt) if place < 0 else place + len(said)

    def _render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        add_generation_prompt: bool,
        kwargs: dict[str, Any] | None,
    ) -> str:
        chat, declared = fit(messages, tools, self._shape(tools))
        return self._run(chat, declared, add_generation_prompt, self._shape(tools), kwargs)

    def _shape(self, tools: list[dict[str, Any]] | None) -> TemplateShape:
        return self.shape if tools is None else self.tool_shape

    def _name(self, tools: list[dict[str, Any]] | None) -> str:
        return "tool_use" if tools is not None and "tool_use" in self._compiled else self._default

    def _find_shape(self, *, with_tools: bool) -> TemplateShape:
        def render(chat: list[Message], tools: list[Any] | None, generate: bool, shape: TemplateShape) -> str:
            return self._run(chat, tools, generate, shape, None, min(PROBE_RENDER_SECONDS, MAX_RENDER_SECONDS))

        source = self._sources[self._name([] if with_tools else None)]
        return find_shape(render, source, with_tools=with_tools)

    def _run(
        self,
        chat: list[Message],
        tools: list[dict[str, Any]] | None,
        add_generation_prompt: bool,
        shape: TemplateShape,
        kwargs: dict[str, Any] | None,
        seconds: float | None = None,
    ) -> str:
        """Messages in the template's shape through the template."""
        deadline = _Deadline(MAX_RENDER_SECONDS if seconds is None else seconds)
        variables = {
            **self._special_tokens,
            **plain(kwargs or {}),
            "messages": _Messages(chat, deadline),
            "tools": tools,
            "documents": plain((kwargs or {}).get("documents")),
            "add_generation_prompt": add_generation_prompt,
        }
        if shape.tools == "system" or (tools is None and shape.omits_tools):
            del variables["tools"]
        parts: list[str] = []
        size = 0
        try:
            for part in self._compiled[self._name(tools)].generate(variables):
                parts.append(part)
                size += len(part)
                if size > MAX_OUTPUT_CHARACTERS:
                    raise RequestError("The chat template made too long a text of these messages.")
                deadline.check()
        except RequestError:
            raise
        except jinja2.TemplateError as error:
            raise RequestError(str(error) or type(error).__name__, param="messages") from None
        except Exception as error:  # a template is a program: it may fail in any way on messages it did not expect
            raise RequestError(
                f"The chat template cannot render these messages: {error or type(error).__name__}", param="messages"
            ) from None
        return "".join(parts)

    # ---- going on with the last message

    def _continue(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, kwargs: dict[str, Any] | None
    ) -> str:
        """The prompt that ends where the last message does.

        The message goes through the template, as in transformers, but where it ends inside of its reasoning or where
        the template would cut the reasoning away: those templates write a block of their own around it. Then the text
        stands as it was given behind what the template begins an answer with.
        """
        shape = self._shape(tools)
        last = messages[-1]
        given = _open_reasoning(last, shape)
        if given is not None and len(messages) > 1:
            return self._answer_head(messages[:-1], tools, kwargs) + given
        if last.get("content") is None:
            raise _nothing_to_go_on_with()
        chat, declared = fit(messages, tools, shape, keep_last=True)
        final = _mark_final(chat[-1], self._sources[self._name(tools)])
        text = self._run(chat, declared, False, shape, kwargs)
        try:
            return _cut_at_mark(text, final)
        except RequestError:
            close = shape.reasoning_close.strip()
            spoken = text_of(last.get("content"))
            if last.get("role") != "assistant" or not close or close not in spoken or len(messages) < 2:
                raise
            return self._answer_head(messages[:-1], tools, kwargs) + spoken

    def _answer_head(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, kwargs: dict[str, Any] | None
    ) -> str:
        """The prompt of an answer, without the reasoning that the template may have opened, or left out, in it."""
        shape = self._shape(tools)
        head = self._render(messages, tools, True, kwargs)
        opening, closing = shape.reasoning_open.strip(), shape.reasoning_close.strip()
        bare = head.rstrip()
        if closing and bare.endswith(closing):
            head = bare.removesuffix(closing)
            bare = head.rstrip()
        for mark in (shape.reasoning_open.rstrip(), opening):
            if mark and bare.endswith(mark):
                return bare.removesuffix(mark)
        return head


def _common_length(one: str, other: str) -> int:
    """Characters that both begin with."""
    if other.startswith(one):
        return len(one)
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if other.startswith(one[low:middle], low):
            low = middle
        else:
            high = middle - 1
    return low


def _open_reasoning(message: dict[str, Any], shape: TemplateShape) -> str | None:
    """The text of a message that ends inside of its reasoning, with the mark before it; None where it does not."""
    opening, closing = shape.reasoning_open.strip(), shape.reasoning_close.strip()
    if message.get("role") != "assistant" or not opening or message.get("tool_calls"):
        return None
    content = text_of(message.get("content"), "" if "assistant" in shape.parts else "\n")
    reasoning = next((message[name] for name in REASONING_FIELDS if isinstance(message.get(name), str)), "")
    if not content:
        return shape.reasoning_open + reasoning if reasoning else None
    return content if content.rfind(opening) > content.rfind(closing) else None


def _mark_final(message: dict[str, Any], source: str) -> str:
    """Put the mark behind the text of the last message; returns that text."""
    content = message.get("content")
    if isinstance(content, str) and "content" in source:
        message["content"] = content + _CONTINUE_TAG
        return content
    if isinstance(content, list):
        for part in reversed(content):
            if isinstance(part, dict) and isinstance(part.get("text"), str):
                text: str = part["text"]
                part["text"] = text + _CONTINUE_TAG
                return text
    raise _nothing_to_go_on_with()


def _nothing_to_go_on_with() -> RequestError:
    return RequestError(
        "continue_final_message is set but the last message has no text to go on with", param="continue_final_message"
    )


def _cut_at_mark(text: str, final: str) -> str:
    bare = _CONTINUE_TAG.strip()
    place = text.rfind(bare)
    if place < 0 or final.strip() not in text:
        raise RequestError(
            "continue_final_message is set but the chat template leaves the last message out or changes it",
            param="continue_final_message",
        )
    if text.startswith(_CONTINUE_TAG, place):
        return text[:place]
    return text[:place].rstrip()  # the template trims its messages, so the end of this one is trimmed too

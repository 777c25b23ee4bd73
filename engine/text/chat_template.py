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

# The body limit is 8 MiB; a template that makes more than this of it is not rendering a conversation.
MAX_OUTPUT_CHARACTERS = 32 * 1024 * 1024
MAX_RENDER_SECONDS = 5.0
# Marks the place where a continued message ends; the trailing space shows whether the template trims.
_CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks training targets; to a server its body is plain template."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own declaration)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A scope of its own, so that `set` inside does not leak out: transformers renders it as a call block.
        return [jinja2.nodes.Scope(body)]


class _Deadline:
    """Raises RequestError when a rendering takes longer than MAX_RENDER_SECONDS."""

    __slots__ = ("_end",)

    def __init__(self) -> None:
        self._end = time.monotonic() + MAX_RENDER_SECONDS

    def check(self) -> None:
        if time.monotonic() > self._end:
            raise RequestError(f"The chat template took longer than {MAX_RENDER_SECONDS:g} s on these messages.")


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

    source: the text of the default one. accepts_parts: whether content may be a list of {"type": "text"} parts;
    where it may not, the caller joins the parts first.
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
        self.accepts_parts = self._accepts_parts()

    @classmethod
    def load(cls, directory: Path, override: str | None = None) -> ChatTemplate | None:
        """The template of a model directory, or `override`: a path, or the text itself (it holds a brace).

        None when the model has none. Raises StartupError naming the file.
        """
        if override is None:
            templates, path = _find(directory)
            origin = str(path)
        elif "{" in override:
            templates, origin = {"default": override}, "--chat-template"
        else:
            templates, origin = {"default": _read_text(Path(override))}, override
        if not templates:
            return None
        return cls(templates, named_tokens(directory), origin)

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
        if continue_final_message and add_generation_prompt:
            raise RequestError(
                "continue_final_message and add_generation_prompt exclude each other: the first goes on with the "
                "last message, the second begins a new one",
                param="continue_final_message",
            )
        chat = [_normalise(message) for message in messages]
        name = "tool_use" if tools is not None and "tool_use" in self._compiled else self._default
        final = _mark_final(chat[-1], self._sources[name]) if continue_final_message else ""
        deadline = _Deadline()
        variables = {
            **self._special_tokens,
            **_plain(kwargs or {}),
            "messages": _Messages(chat, deadline),
            "tools": _plain(tools),
            "documents": _plain((kwargs or {}).get("documents")),
            "add_generation_prompt": add_generation_prompt,
        }
        parts: list[str] = []
        size = 0
        try:
            for part in self._compiled[name].generate(variables):
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
        text = "".join(parts)
        return _cut_at_mark(text, final) if continue_final_message else text

    def _accepts_parts(self) -> bool:
        """Ask the template itself: does a list of parts come out as its text?"""
        word = "qzxprobe"
        try:
            text = self.render([{"role": "user", "content": [{"type": "text", "text": word}]}])
        except RequestError:
            return False
        return word in text and "'type'" not in text and '"type"' not in text


def _plain(value: Any) -> Any:
    """A copy made of JSON's types alone, so that a template finds no method on anything."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return f"<{type(value).__name__}>"


def _normalise(message: dict[str, Any]) -> dict[str, Any]:
    """Without nulls (templates print them as "None"), and with reasoning under the names that templates read."""
    chat = {key: _plain(value) for key, value in message.items() if value is not None}
    reasoning = next((chat[name] for name in _REASONING_FIELDS if name in chat), None)
    if reasoning is not None:
        chat = {"thinking": reasoning, **chat, "reasoning_content": reasoning}
    return chat


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
    raise RequestError(
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

"""Asks a chat template what shape it wants: small conversations go through it, and what comes out is the answer.

Each question is a conversation given in one shape after the other (see template_shape.fit) until all its words stand
in the prompt. Once per template, at load; number and time of the renderings are bounded, and a template that answers
nothing keeps the default shape.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from engine.request import RequestError
from engine.text.template_shape import Message, TemplateShape, fit

# render(messages, tools, add_generation_prompt) -> text; tools None leaves the variable undefined where `omits_tools`.
Render = Callable[[list[Message], list[Any] | None, bool, TemplateShape], str]

# A template takes 30 to 110 renderings of well under a millisecond; the bounds are for what is hardly a template.
MAX_PROBES = 400
MAX_PROBE_SECONDS = 10.0
# Of one rendering.
PROBE_RENDER_SECONDS = 1.0

# Words that no template writes of its own.
_KEY, _VALUE = "qzxkey", "qzxvalue"
_NAMES = ("qzxname", "qzxother")
# Of tools that nobody declares: a declaration must not stand for a call.
_CALLED = ("qzxcalled", "qzxlater")
_ARGUMENTS = {_KEY: _VALUE, "qzxlist": [1, True]}
# Arguments as Python writes them, or quoted twice; parts written out instead of read.
_RAW = re.compile(rf"""'{_KEY}'|\\+"{_KEY}|['"]text['"]: ?['"]qzx""")
# As OpenAI's are, and as small servers' are: Mistral's templates count the characters.
_IDS = ("call_qzxprobe0123456789abcd", "qzx1")
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "qzxwords",
            "parameters": {
                "type": "object",
                "properties": {"qzxparam": {"type": "string", "description": "qzxmore"}},
                "required": ["qzxparam"],
            },
        },
    }
    for name in _NAMES
]
_BARE_TOOLS = [
    {"type": "function", "function": {"name": _NAMES[0]}},
    {
        "type": "function",
        "function": {
            "name": _NAMES[1],
            "parameters": {
                "type": "object",
                "properties": {
                    "qzxparam": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                    "qzxsecond": {"type": "string"},
                    "qzxthird": {"type": "array"},
                    "qzxfourth": {},
                },
            },
        },
    },
]


class _Spent(Exception):
    """The bound on the probes is reached: what is known so far has to do."""


def find_shape(render: Render, source: str, *, with_tools: bool) -> TemplateShape:
    """The shape that a template wants: of conversations with tools, or without."""
    probe = _Probe(render, source, with_tools)
    with contextlib.suppress(_Spent):
        probe.run()
    return probe.shape


def _system(number: int) -> Message:
    return {"role": "system", "content": f"qzxsystem{number}"}


def _user(number: int) -> Message:
    return {"role": "user", "content": f"qzxuser{number}"}


def _answer(number: int, **more: Any) -> Message:
    return {"role": "assistant", "content": f"qzxanswer{number}", **more}


def _calls(*numbers: int, content: str | None = None, arguments: Any = _ARGUMENTS, **more: Any) -> Message:
    calls = [
        {"id": _IDS[number], "type": "function", "function": {"name": _CALLED[number], "arguments": arguments}}
        for number in numbers
    ]
    return {"role": "assistant", "content": content, "tool_calls": calls, **more}


def _result(number: int, content: Any = None) -> Message:
    return {"role": "tool", "tool_call_id": _IDS[number], "content": content or f"qzxresult{number}"}


def _parts(role: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": f"qzx{role}part{number}"} for number in (1, 2)]


def _words(messages: Iterable[Message]) -> list[str]:
    """What a prompt of these messages has to hold."""
    words: list[str] = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, str):
            words += [word for word in content.split() if word.startswith("qzx")]
        elif content:
            words += [part["text"] for part in content]
        for call in message.get("tool_calls", ()):
            words += [call["function"]["name"], _KEY, _VALUE]
    return words


def _with(shape: TemplateShape, names: Iterable[str], values: Iterable[Any]) -> TemplateShape:
    changes: dict[str, Any] = dict(zip(names, values, strict=True))
    return replace(shape, **changes)


class _Probe:
    """shape: what is known so far."""

    def __init__(self, render: Render, source: str, with_tools: bool) -> None:
        self._render = render
        self._source = source
        self._tools: list[Any] | None = _TOOLS if with_tools else None
        self._num_probes = 0
        self._end = time.monotonic() + MAX_PROBE_SECONDS
        # Of the template's own text.
        self._num_none = 0
        self.shape = TemplateShape(developer=re.search("[\"']developer[\"']", source) is not None)

    def run(self) -> None:
        if not self._reads_users():
            return
        # First, as it would have every other question with an answer in it refused.
        self._choose("needs_reasoning", (False, True), [_user(1), _answer(1), _user(2)])
        self._ask_roles()
        if self._tools is not None:
            self._ask_tools()
            self._num_none = (self._text([_user(1)], self.shape) or "").count("None")
        self._ask_calls()
        if self.shape.tools == "lost" and self.shape.calls == "structured":
            bare = self._text([_user(1)], self.shape) or ""
            written = self._text([_user(1), _calls(0), _result(0)], self.shape) or ""
            if _CALLED[0] in written and not any(name in bare for name in _NAMES):
                # It writes calls and says nothing of what can be called.
                self._choose("tools", ("words",), [_user(1)], ["qzxuser1", "qzxparam", *_NAMES])
        self._ask_marks()

    # ---- asking

    def _text(
        self, messages: list[Message], shape: TemplateShape, *, generate: bool = True, tools: list[Any] | None = None
    ) -> str | None:
        """The prompt of a conversation in a shape; None where the template refuses it."""
        self._num_probes += 1
        if self._num_probes > MAX_PROBES or time.monotonic() > self._end:
            raise _Spent
        try:
            given, declared = fit(messages, tools or self._tools, shape)
            return self._render(given, declared, generate, shape)
        except RequestError:
            return None

    def _shows(
        self,
        messages: list[Message],
        shape: TemplateShape,
        words: list[str] | None = None,
        tools: list[Any] | None = None,
    ) -> bool:
        """Whether the conversation stands in the prompt: every word, no "None", nothing as Python writes it."""
        text = self._text(messages, shape, tools=tools)
        if text is None or text.count("None") > self._num_none:
            return False
        if _RAW.search(text):
            return False
        return all(word in text for word in (_words(messages) if words is None else words))

    def _choose(
        self, field: str, values: Iterable[Any], messages: list[Message], words: list[str] | None = None
    ) -> bool:
        """Take the first value with which the conversation shows; False, and nothing changed, where none does."""
        for value in values:
            shape = replace(self.shape, **{field: value})
            if self._shows(messages, shape, words):
                self.shape = shape
                return True
        return False

    # ---- questions

    def _reads_users(self) -> bool:
        """The conversation that every template takes; without it nothing else can be asked."""
        forms: dict[str, tuple[Any, ...]] = {
            "tools": ("nested",) if self._tools is None else ("nested", "flat", "system"),
            "omits_tools": (False, True) if self._tools is None else (False,),
            "needs_parts": (frozenset(), frozenset({"user"})),
            "needs_system": (False, True) if "system" in self._source else (False,),
        }
        for values in itertools.product(*forms.values()):
            shape = _with(self.shape, forms, values)
            text = self._text([_user(1)], shape)
            if text is not None and "qzxuser1" in text and not _RAW.search(text):
                self.shape = shape
                self._num_none = text.count("None")
                return True
        return False

    def _ask_roles(self) -> None:
        self._choose("system", (True, False), [_system(1), _user(1)])
        if self.shape.developer:
            self._choose("developer", (True, False), [{**_system(1), "role": "developer"}, _user(1)])
        roles: list[tuple[str, Callable[[Any], list[Message]]]] = [
            ("user", lambda content: [{"role": "user", "content": content}]),
            ("assistant", lambda content: [_user(1), {"role": "assistant", "content": content}, _user(2)]),
        ]
        if self.shape.system:
            roles.append(("system", lambda content: [{"role": "system", "content": content}, _user(1)]))
        for role, conversation in roles:
            self._ask_parts(role, conversation)
        if self.shape.system:
            self._choose("systems_in_row", (True, False), [_system(1), _system(2), _user(1)])
            anywhere = [_system(1), _user(1), _system(2), _answer(1), _system(3), _user(2), _system(4)]
            self._choose("system_in_middle", (True, False), anywhere)
        else:
            self.shape = replace(self.shape, systems_in_row=False, system_in_middle=False)
        self._choose("users_in_row", (True, False), [_user(1), _user(2), _answer(1), _user(3)])
        self._choose("assistants_in_row", (True, False), [_user(1), _answer(1), _answer(2), _user(2)])
        self._choose("assistant_first", (True, False), [_answer(1), _user(1)])
        if self.shape.system:
            self._choose("no_user", (True, False), [_system(1)])
        empty = {"role": "assistant", "content": None, "reasoning_content": "qzxthought"}
        turns = [_user(1), empty, _user(2)]
        self._choose("empty_content", ("empty", "absent", "null", "space", "dropped"), turns)

        thought = [_user(1), _answer(1, reasoning_content="qzxthought")]
        self._choose("reasoning_parts", (False, True), thought, [*_words(thought), "qzxthought"])

    def _ask_parts(self, role: str, conversation: Callable[[Any], list[Message]]) -> None:
        accepting = replace(self.shape, parts=self.shape.parts | {role})
        needing = replace(accepting, needs_parts=accepting.needs_parts | {role})
        if not self._shows(conversation("qzxwhole"), self.shape) and self._shows(conversation("qzxwhole"), needing):
            accepting = self.shape = replace(self.shape, needs_parts=needing.needs_parts)
            accepting = replace(accepting, parts=accepting.parts | {role})
        if self._shows(conversation(_parts(role)), accepting):
            self.shape = accepting

    def _ask_tools(self) -> None:
        words = ["qzxuser1", "qzxparam", *_NAMES]
        if not self._choose("tools", ("nested", "flat", "system"), [_user(1)], words):
            self.shape = replace(self.shape, tools="lost")
            return
        words = ["qzxuser1", *_NAMES]
        shapes = [_with(self.shape, ["tool_fields"], [fields]) for fields in ("given", "filled")]
        found = next((shape for shape in shapes if self._shows([_user(1)], shape, words, _BARE_TOOLS)), None)
        if found is None:
            # Some write None themselves, of parameters that may be left out.
            texts = ((shape, self._text([_user(1)], shape, tools=_BARE_TOOLS) or "") for shape in shapes)
            found = next((shape for shape, text in texts if all(word in text for word in words)), None)
        self.shape = found or self.shape

    def _ask_calls(self) -> None:
        if not self._find_calls():
            return
        shape = self.shape
        if shape.system:
            self._choose("system_by_last_user", (False, True), [_system(1), _user(1), _calls(0), _result(0)])
        if shape.assistant_first:
            self._choose("assistant_first", (True, False), [_calls(0), _result(0), _user(1)])
        if shape.tool_role:
            self._ask_parts("tool", lambda content: [_user(1), _calls(0), _result(0, content), _answer(1)])
        both = [_user(1), _calls(0, 1), _result(0), _result(1), _answer(1), _user(2)]
        self._choose("parallel_calls", (True, False), both)
        spoken = [_user(1), _calls(0, content="qzxspoken"), _result(0), _answer(1), _user(2)]
        if not self._choose("text_with_calls", ("kept", "split"), spoken):
            self._choose("text_with_calls", ("dropped",), spoken, ["qzxresult0", _CALLED[0], _VALUE])
        thought = [_user(1), _calls(0, content="qzxspoken", reasoning_content="qzxthought"), _result(0)]
        words = ["qzxresult0", _CALLED[0], _VALUE] + ["qzxspoken"] * (self.shape.text_with_calls != "dropped")
        self._choose("reasoning_with_calls", ("kept", "joined", "dropped"), thought, words)
        if shape.arguments == "object" and shape.calls == "structured":
            garbled = [_user(1), _calls(0, arguments=f'{{"{_KEY}": "qzxcut'), _result(0)]
            text = self._text(garbled, replace(self.shape, loose_arguments=True))
            self.shape = replace(self.shape, loose_arguments=text is not None and "qzxcut" in text)
        if shape.tool_role:
            self._choose("user_after_tool", (True, False), [_user(1), _calls(0), _result(0), _user(2), _answer(1)])
            self._choose("lone_results", (True, False), [_user(1), _result(0), _answer(1), _user(2)])
            for between in ([_user(2)], [_system(2)] if shape.system_in_middle else []):
                if between and not self.shape.calls_first:
                    turns = [_user(1), _calls(0), *between, _result(0), _answer(1)]
                    self._choose("calls_first", (False, True), turns)

    def _find_calls(self) -> bool:
        """The first form in which calls and their results stand in the prompt, in two turns of a loop."""
        turns = [_user(1), _calls(0), _result(0), _answer(1), _user(2), _calls(1), _result(1)]
        forms: dict[str, tuple[Any, ...]] = {
            "tool_role": (True, False),
            "flat_calls": (False, True),
            "call_ids": ("any", "nine", "named"),
            "arguments": ("object", "text"),
            "call_content": ("absent", "null", "empty"),
        }
        for values in itertools.product(*forms.values()):
            shape = _with(self.shape, forms, values)
            if self._shows(turns, shape):
                self.shape = shape
                return True
        # Of a call without its arguments there is at least the name.
        words = [word for word in _words(turns) if word not in (_KEY, _VALUE)]
        if self._choose("call_content", forms["call_content"], turns, words):
            return True
        for tool_role in (True, False):
            shape = replace(self.shape, calls="text", tool_role=tool_role)
            if self._shows(turns, shape):
                self.shape = shape
                return True
        return False

    def _ask_marks(self) -> None:
        """What stands before and behind the reasoning of a last turn, or what the template begins an answer with."""
        head = self._text([_user(1)], self.shape) or ""
        turn = _answer(1, reasoning_content="qzxthought")
        text = self._text([_user(1), turn], self.shape, generate=False) or ""
        thought, answer = text.find("qzxthought"), text.find("qzxanswer1")
        opening = closing = ""
        if 0 <= thought < answer:
            before, closing = text[:thought], text[thought + len("qzxthought") : answer]
            opening = before[len(head) :] if before.startswith(head) else ""
            opening = opening or _last_tag(before)
        elif channel := _CHANNEL.search(head):
            # Gemma 4 begins an answer without reasoning behind an empty one, and cuts those of past answers.
            opening, closing = channel.groups()
        else:
            opening = _last_tag(head)
            if _CLOSING.search(opening):
                # Without reasoning the answer begins behind its end.
                opening = opening.replace("/", "", 1)
            elif not _THINKS.search(opening):
                found = _CLOSING.search(self._source)
                opening = "" if found is None else f"{found[0].replace('/', '', 1)}\n"
        if opening.strip():
            self.shape = replace(
                self.shape, reasoning_open=opening, reasoning_close=closing or f"\n{_closing_of(opening)}\n\n"
            )


_THINKS = re.compile("think|reason", re.IGNORECASE)
_CHANNEL = re.compile(r"(<\|channel>\w+\s*)(<channel\|>)\s*\Z")
_CLOSING = re.compile(r"</\w*think\w*>|\[/THINK\]")
_TAG = re.compile(r"(?:<[^<>\s]{1,40}>|\[[A-Z_]{1,40}\])\s*\Z")


def _last_tag(text: str) -> str:
    """The tag that a text ends with, and the white space behind it."""
    found = _TAG.search(text[-80:])
    return "" if found is None else found[0]


def _closing_of(opening: str) -> str:
    tag = opening.strip()
    return f"{tag[0]}/{tag[1:]}"

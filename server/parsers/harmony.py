"""gpt-oss: every message says its channel, `<|channel|>analysis<|message|>...<|end|>`: reasoning, content or a call.

One grammar reads reasoning and calls, so both registries name it.
"""

from __future__ import annotations

import re
from typing import Any

from server.parsers.base import Malformed, ReasoningFamily, Scanner, Sink, Steps, ToolFamily
from server.parsers.formats import schema_of, tags
from server.parsers.json_text import read_arguments
from server.parsers.messages import MESSAGE, RECIPIENT, begins_with_recipient, read_header

_START, _CHANNEL = "<|start|>", "<|channel|>"
_CONSTRAIN, _END, _RETURN, _CALL = "<|constrain|>", "<|end|>", "<|return|>", "<|call|>"
_ENDS = (_END, _RETURN, _CALL)
_MARKERS = (_START, _CHANNEL, MESSAGE, _CONSTRAIN, *_ENDS)
# What a call ends before, its own end mark first.
_AFTER_CALL = (_CALL, _END, _RETURN, _START, _CHANNEL)
_CHANNEL_NAME = re.compile(r"<\|channel\|>\s*(\w+)")


def _run(scanner: Scanner) -> Steps[None]:
    yield from _read_messages(scanner, False)


def _read_messages(scanner: Scanner, start_inside: bool) -> Steps[None]:
    sink: Sink = scanner.content
    if start_inside:
        scanner.begin_reasoning()
        sink = scanner.reasoning
    elif (yield from begins_with_recipient(scanner)):
        sink = yield from _read_header(scanner, "")
    while marker := (yield from scanner.until((_START, _CHANNEL, MESSAGE, *_ENDS), sink)):
        sink = scanner.content
        if marker in (_START, _CHANNEL):
            sink = yield from _read_header(scanner, marker)
        else:
            scanner.settle()
    if sink == scanner.reasoning:
        scanner.flush_reasoning()


def _read_header(scanner: Scanner, marker: str) -> Steps[Sink]:
    """The rest of a header, and the call that it announces; returns where the text of its message goes."""
    header = yield from read_header(scanner, marker)
    if header is None:
        return scanner.content
    channel = _CHANNEL_NAME.search(header)
    in_analysis = channel is not None and channel[1] == "analysis"
    recipient = RECIPIENT.search(header)
    if recipient is not None and scanner.has_tools and _is_call(scanner, recipient[1], in_analysis):
        try:
            yield from _read_call(scanner, recipient[1].removeprefix("functions."))
        except Malformed:
            scanner.fail()
        return scanner.content
    scanner.settle()
    if in_analysis:
        scanner.begin_reasoning()
        return scanner.reasoning
    scanner.end_reasoning()
    return scanner.content


def _is_call(scanner: Scanner, recipient: str, in_analysis: bool) -> bool:
    """Tools of the model's own, called while it thinks, belong to its reasoning; and a role is no tool."""
    if recipient in ("assistant", "user", "all"):
        return False
    is_own = recipient.split(".")[0] in ("python", "browser", "container")
    return not (is_own and in_analysis and recipient not in (scanner.tools or ()))


def _read_call(scanner: Scanner, name: str) -> Steps[None]:
    scanner.start_call(name)
    if (yield from scanner.space()) in ("{", "["):
        yield from read_arguments(scanner, scanner.arguments, _AFTER_CALL)
        # What else the message holds is none of the arguments.
        yield from scanner.before(_AFTER_CALL, _drop)
    elif (yield from scanner.look_at(_AFTER_CALL)) is not None or (scanner.closed and not scanner.cut):
        scanner.arguments("{}")
    else:
        yield from scanner.before(_AFTER_CALL, scanner.arguments)
    scanner.end_call()


def _drop(text: str) -> None:
    """A sink for what nobody wants to know."""


def _call_format(tools: list[tuple[str, dict[str, Any]]], parallel: bool) -> dict[str, Any]:
    # <|call|> is an EOS of these models, so there is one call in a turn.
    calls = [
        {
            "type": "tag",
            "begin": f"{_CHANNEL}commentary to=functions.{name} {_CONSTRAIN}json{MESSAGE}",
            "content": schema_of(schema),
            "end": "",
        }
        for name, schema in tools
    ]
    return tags(calls, "", False)


FAMILY = ToolFamily("harmony", _run, _MARKERS, _call_format)
_FINAL = f"{_CHANNEL}final{MESSAGE}"
REASONING = ReasoningFamily(
    "harmony",
    _read_messages,
    _MARKERS,
    open=f"{_CHANNEL}analysis{MESSAGE}",
    close=_FINAL,
    closing=f"{_END}{_START}assistant{_FINAL}",
    whole=True,
    end=_END,
)

"""Muse Glimmer: every message says to whom it goes, and calls are ATEM tags in one to a tool.

` to=self<|message|>...<|eom|><|start|>assistant to=user<|message|>...<|eot|>`; the prompt ends in `<|start|>assistant`.
One grammar reads reasoning and calls, so both registries name it.
"""

from __future__ import annotations

from typing import Any

from server.parsers.base import Malformed, ReasoningFamily, Scanner, Sink, Steps, ToolFamily
from server.parsers.formats import Format, const, either, sequence
from server.parsers.messages import MESSAGE, RECIPIENT, begins_with_recipient, read_header
from server.parsers.tagged import Tags, drop_begun, family, read_tagged_call

_START, _END, _LAST = "<|start|>", "<|eom|>", "<|eot|>"
_FRAME = (_START, MESSAGE, _END, _LAST)
_OPEN, _CLOSE = "<atem:function_calls>", "</atem:function_calls>"
_SPELLING = Tags(
    call=("<atem:invoke name=", ">"),
    call_end="</atem:invoke>",
    key=("<atem:parameter name=", ">"),
    value=("", "</atem:parameter>"),
    section=(_OPEN, _CLOSE),
    tail=(_END, _LAST, _START),
    quoted=True,
)
_INVOKE = _SPELLING.call[0]
_NAME = "muse_glimmer"


def _run(scanner: Scanner) -> Steps[None]:
    yield from _read_messages(scanner, False)


def _read_messages(scanner: Scanner, start_inside: bool) -> Steps[None]:
    sink: Sink = scanner.content
    if start_inside:
        scanner.begin_reasoning()
        sink = scanner.reasoning
    elif (yield from begins_with_recipient(scanner)):
        sink = yield from _read_header(scanner, "")
    while True:
        calls = (_OPEN, _CLOSE, _INVOKE) if scanner.has_tools and sink == scanner.content else ()
        marker = yield from scanner.until((*_FRAME, *calls), sink)
        if marker is None:
            break
        if marker == _START:
            sink = yield from _read_header(scanner, marker)
        elif marker in (_OPEN, _INVOKE):
            yield from _read_call(scanner, marker)
        else:
            scanner.settle()
            sink = sink if marker == _CLOSE else scanner.content
    if sink == scanner.reasoning:
        scanner.flush_reasoning()


def _read_header(scanner: Scanner, marker: str) -> Steps[Sink]:
    """The rest of a header; returns where the text of its message goes."""
    header = yield from read_header(scanner, marker)
    if header is None:
        return scanner.content
    scanner.settle()
    recipient = RECIPIENT.search(header)
    if recipient is not None and recipient[1] == "self":
        scanner.begin_reasoning()
        return scanner.reasoning
    scanner.end_reasoning()
    return scanner.content


def _read_call(scanner: Scanner, marker: str) -> Steps[None]:
    try:
        if marker == _OPEN:
            yield from scanner.space()
            yield from scanner.expect(_INVOKE)
        yield from read_tagged_call(scanner, _SPELLING, _INVOKE, declared=marker != _OPEN)
    except Malformed:
        drop_begun(scanner, (_INVOKE,))
        scanner.fail()
        return
    drop_begun(scanner, _SPELLING.inner)


def _call_format(tools: list[tuple[str, dict[str, Any]]], parallel: bool) -> Format:
    # There is one call in a turn, and its message is the tool's.
    forms: list[Format] = [
        sequence(const(f" to={tool[0]}{MESSAGE}"), _CALLS.call_format([tool], False)) for tool in tools
    ]
    return either(*forms)


_CALLS = family(_NAME, _SPELLING)
_MARKERS = (*_FRAME, _OPEN, _CLOSE)
FAMILY = ToolFamily(_NAME, _run, _MARKERS, _call_format)
_ANSWER = f"{_START}assistant to=user{MESSAGE}"
REASONING = ReasoningFamily(
    _NAME,
    _read_messages,
    _MARKERS,
    open=f" to=self{MESSAGE}",
    close=_ANSWER,
    closing=f"{_END}{_ANSWER}",
    whole=True,
    end=_END,
)

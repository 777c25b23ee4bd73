"""Calls of Solar Open: an id, the name and the arguments as JSON, each behind a mark; and its reasoning.

`<|tool_calls|><|tool_call:begin|>id<|tool_call:name|>get_weather<|tool_call:args|>{...}<|tool_call:end|><|calls|>`.
"""

from __future__ import annotations

import re
from typing import Any

from server.parsers.base import MAX_NAME, Malformed, ReasoningFamily, Scanner, Sink, Steps, ToolFamily
from server.parsers.call_objects import close_call
from server.parsers.formats import Format, const, schema_of, sequence, tags
from server.parsers.json_text import read_arguments
from server.parsers.tagged import drop_begun

_ALL_OPEN, _ALL_CLOSE = "<|tool_calls|>", "<|calls|>"
_OPEN, _NAME, _ARGUMENTS, _CLOSE = (
    "<|tool_call:begin|>",
    "<|tool_call:name|>",
    "<|tool_call:args|>",
    "<|tool_call:end|>",
)
_ENDS = (_CLOSE, _ALL_CLOSE, _OPEN)
# A turn goes on behind its reasoning, and may have several parts.
_THINK, _END, _CONTENT = "<|think|>", "<|end|>", "<|content|>"
_BEGIN = "<|begin|>assistant"
_TURN = (_BEGIN, _CONTENT, "<|flush|>", _END)
# Text before a mark that is spoken of: a quote, or the middle of a sentence.
_SPOKEN = re.compile(r"[`'\"(]\Z|[^\s.!?:][ \t]\Z")


def _run(scanner: Scanner) -> Steps[None]:
    yield from _read_content(scanner, (_ALL_OPEN, _OPEN))


class _Tail:
    """A sink that knows whether what comes next is spoken of."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._text = ""

    def __call__(self, text: str) -> None:
        self._text = (self._text + text)[-2:]
        self._sink(text)

    @property
    def is_speaking(self) -> bool:
        return _SPOKEN.search(self._text) is not None


def _read_parts(scanner: Scanner, start_inside: bool) -> Steps[None]:
    """All parts of a turn: thoughts, content and calls, in any order."""
    inside = start_inside or (yield from scanner.accept(_THINK, spaced=True))
    marks = (_ALL_OPEN, _OPEN, _THINK) if scanner.has_tools else (_THINK,)
    while inside or (yield from _read_content(scanner, marks)):
        inside = False
        if not (yield from _read_thought(scanner)):
            return


def _read_thought(scanner: Scanner) -> Steps[bool]:
    """Returns whether the turn goes on behind it."""
    while (yield from scanner.accept(_THINK, spaced=True)):
        pass
    scanner.begin_reasoning()
    drafts = scanner.drafts()
    tail = _Tail(drafts.push)
    # Without its end, where content begins.
    while marker := (yield from scanner.until((_END, _BEGIN + _CONTENT, _CONTENT), tail)):
        if marker == _END or not tail.is_speaking:
            drafts.close()
            scanner.end_reasoning()
            return True
        tail(marker)
        scanner.settle()
    if not drafts.finish():
        scanner.flush_reasoning()
    return False


def _read_content(scanner: Scanner, marks: tuple[str, ...]) -> Steps[bool]:
    """Content and calls up to a thought, whose mark is read, or to the end of the text: False."""
    tail = _Tail(scanner.content)
    while marker := (yield from scanner.until(marks, tail)):
        if marker == _THINK:
            if not tail.is_speaking:
                return True
            tail(marker)
            scanner.settle()
            continue
        try:
            if marker == _ALL_OPEN:
                yield from scanner.space()
                yield from scanner.expect(_OPEN)
            yield from _read_call(scanner)
            yield from close_call(scanner, _CLOSE)
        except Malformed:
            scanner.fail()
            continue
        yield from scanner.accept(_ALL_CLOSE, spaced=True)
        drop_begun(scanner, _ENDS)
    return False


def _read_call(scanner: Scanner) -> Steps[None]:
    call_id, mark = yield from scanner.raw_until((_NAME, _ARGUMENTS), MAX_NAME)
    if mark != _NAME:
        raise Malformed
    name, _ = yield from scanner.raw_until((_ARGUMENTS,), MAX_NAME)
    scanner.start_call(name.strip(), call_id.strip() or None)
    if (yield from scanner.space()) == "{":
        yield from read_arguments(scanner, scanner.arguments, _ENDS)
    elif not scanner.cut:
        scanner.arguments("{}")
    scanner.end_call()


def _call_format(tools: list[tuple[str, dict[str, Any]]], parallel: bool) -> Format:
    calls: list[Format] = [
        {
            "type": "tag",
            "begin": _OPEN,
            "content": sequence(
                {"type": "regex", "pattern": "[a-z0-9]{10}"}, const(f"{_NAME}{name}{_ARGUMENTS}"), schema_of(schema)
            ),
            "end": _CLOSE,
        }
        for name, schema in tools
    ]
    return sequence(const(_ALL_OPEN), tags(calls, "", parallel))


FAMILY = ToolFamily(
    "solar_open", _run, (_ALL_OPEN, _ALL_CLOSE, _OPEN, _NAME, _ARGUMENTS, _CLOSE), _call_format, wrap=_TURN
)
REASONING = ReasoningFamily(
    "solar_open", _read_parts, (_THINK, _END), _THINK, _END, f"\n{_END}\n", wrap=_TURN, to_end=True
)

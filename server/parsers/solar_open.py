"""Calls of Solar Open: an id, the name and the arguments as JSON, each behind a mark; and its reasoning.

`<|tool_calls|><|tool_call:begin|>id<|tool_call:name|>get_weather<|tool_call:args|>{...}<|tool_call:end|><|calls|>`.
"""

from __future__ import annotations

from typing import Any

from server.parsers.base import MAX_NAME, Malformed, Scanner, Steps, ToolFamily
from server.parsers.call_objects import close_call
from server.parsers.formats import Format, const, schema_of, sequence, tags
from server.parsers.json_text import read_arguments
from server.parsers.marked_thoughts import thoughts
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
_TURN = ("<|begin|>assistant", "<|content|>", "<|flush|>", "<|end|>")


def _run(scanner: Scanner) -> Steps[None]:
    while marker := (yield from scanner.until((_ALL_OPEN, _OPEN), scanner.content)):
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
REASONING = thoughts("solar_open", ("<|think|>",), ("<|end|>",), wrap=_TURN)

"""Tool calls of Hermes, Qwen 2.5 and Qwen 3: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, repeated."""

from __future__ import annotations

from typing import Any

from server.parsers.base import SPACE, Malformed, Scanner, Steps, ToolFamily
from server.parsers.formats import json_call, tags
from server.parsers.json_text import close_call, read_call_list, read_call_object
from server.parsers.tagged import drop_begun

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_ENDS = (_CLOSE, _OPEN)
_FENCE = "```"


def _run(scanner: Scanner) -> Steps[None]:
    while (yield from scanner.until((_OPEN,), scanner.content)):
        try:
            if (yield from scanner.accept(_FENCE, spaced=True)):
                yield from scanner.accept("json")
            if (yield from scanner.space()) == "[":
                yield from read_call_list(scanner, _ENDS)
            else:
                yield from _read_objects(scanner)
            yield from scanner.accept(_FENCE, spaced=True)
            # Models that end with their last brace are understood, and those that close twice.
            while (yield from close_call(scanner, _CLOSE)):
                pass
            drop_begun(scanner, (_CLOSE,))
        except Malformed:
            scanner.fail()


def _read_objects(scanner: Scanner) -> Steps[None]:
    """One call, or several in one tag."""
    while True:
        yield from read_call_object(scanner, _ENDS)
        character, distance = yield from scanner.look_past(SPACE + ",;")
        if character != "{":
            return
        scanner.begin()
        scanner.skip(distance)


def _call_format(tools: list[tuple[str, dict[str, Any]]], parallel: bool) -> dict[str, Any]:
    calls = [json_call(_OPEN + "\n", name, "arguments", schema, "\n" + _CLOSE) for name, schema in tools]
    return tags(calls, "\n", parallel)


FAMILY = ToolFamily("hermes", _run, (_OPEN, _CLOSE), _call_format)

"""Tool calls of DeepSeek V3 and R1 (`function<sep>name`, then a fenced block of JSON) and V3.1 (`name<sep>{...}`).

One grammar reads both; which one is forced depends on the family's name.
"""

from __future__ import annotations

from typing import Any

from server.parsers.base import MAX_NAME, Malformed, Scanner, Steps, ToolFamily
from server.parsers.formats import const, schema_of, sequence, tags
from server.parsers.json_text import close_call, read_arguments

_ALL_OPEN, _ALL_CLOSE = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_OPEN, _SEPARATOR, _CLOSE = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
_FENCE = "```"
_ENDS = (_CLOSE, _ALL_CLOSE, _OPEN)
_MARKERS = (_ALL_OPEN, _ALL_CLOSE, _OPEN, _SEPARATOR, _CLOSE)


def _run(scanner: Scanner) -> Steps[None]:
    while marker := (yield from scanner.until((_ALL_OPEN, _OPEN), scanner.content)):
        try:
            if marker == _ALL_OPEN:
                yield from scanner.space()
                yield from scanner.expect(_OPEN)
            yield from _read_call(scanner)
            yield from close_call(scanner, _CLOSE)
            yield from scanner.accept(_ALL_CLOSE, spaced=True)
        except Malformed:
            scanner.fail()


def _read_call(scanner: Scanner) -> Steps[None]:
    name, _ = yield from scanner.raw_until((_SEPARATOR,), MAX_NAME)
    character = yield from scanner.space()
    if not character and name.strip() == "function":
        raise Malformed
    bare = (yield from scanner.look_at(_ENDS)) is not None
    fenced = bool(character) and character != "{" and not bare
    if fenced:
        # The name stands on a line of its own, and the fence may be left out.
        name, mark = yield from scanner.raw_until(("\n", _FENCE), MAX_NAME)
        if mark == _FENCE or (yield from scanner.accept(_FENCE, spaced=True)):
            yield from scanner.accept("json")
        character = yield from scanner.space()
        bare = (yield from scanner.look_at(_ENDS)) is not None
        if character and character != "{" and not bare:
            raise Malformed
    scanner.start_call(name)
    if bare or not character:
        if not scanner.cut:
            scanner.arguments("{}")
        scanner.end_call()
        return
    yield from read_arguments(scanner, scanner.arguments, _ENDS, fence=_FENCE if fenced else "")
    scanner.end_call()
    if fenced:
        yield from scanner.accept(_FENCE, spaced=True)


def _v3_format(tools: list[tuple[str, dict[str, Any]]], parallel: bool) -> dict[str, Any]:
    calls = [
        {
            "type": "tag",
            "begin": f"{_OPEN}function{_SEPARATOR}{name}\n```json\n",
            "content": schema_of(schema),
            "end": f"\n```{_CLOSE}",
        }
        for name, schema in tools
    ]
    return sequence(const(_ALL_OPEN), tags(calls, "\n", parallel), const(_ALL_CLOSE))


def _v31_format(tools: list[tuple[str, dict[str, Any]]], parallel: bool) -> dict[str, Any]:
    calls = [
        {"type": "tag", "begin": f"{_OPEN}{name}{_SEPARATOR}", "content": schema_of(schema), "end": _CLOSE}
        for name, schema in tools
    ]
    return sequence(const(_ALL_OPEN), tags(calls, "", parallel), const(_ALL_CLOSE))


V3 = ToolFamily("deepseek_v3", _run, _MARKERS, _v3_format)
V31 = ToolFamily("deepseek_v31", _run, _MARKERS, _v31_format)

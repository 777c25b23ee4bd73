"""Tool calls of DeepSeek V3 and R1 (`function<sep>name`, then a fenced block of JSON) and V3.1 (`name<sep>{...}`).

One grammar reads both; which one is forced depends on the family's name.
"""

from __future__ import annotations

from typing import Any

from server.parsers.base import MAX_NAME, Malformed, Scanner, Steps, ToolFamily
from server.parsers.call_objects import close_call, read_call_object
from server.parsers.formats import const, schema_of, sequence, tags
from server.parsers.json_text import read_arguments
from server.parsers.tagged import drop_begun

_ALL_OPEN, _ALL_CLOSE = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_OPEN, _SEPARATOR, _CLOSE = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
# As models spell the first mark that have no token for it: those distilled from R1.
_ALSO_ALL_OPEN = ("<｜tool_calls_begin｜>", "<｜tool calls begin｜>", "<｜tool\\_calls\\_begin｜>", "<｜tool▁calls｜>")
_KIND = "function"
_FENCE = "```"
_ENDS = (_CLOSE, _ALL_CLOSE, _OPEN)
_MARKERS = (_ALL_OPEN, _ALL_CLOSE, _OPEN, _SEPARATOR, _CLOSE)


def _run(scanner: Scanner) -> Steps[None]:
    while marker := (yield from scanner.until((*_ALSO_ALL_OPEN, _ALL_OPEN, _OPEN), scanner.content)):
        try:
            if marker != _OPEN:
                yield from scanner.accept(_OPEN, spaced=True)
            yield from _read_call(scanner)
            yield from close_call(scanner, _CLOSE)
            yield from scanner.accept(_ALL_CLOSE, spaced=True)
        except Malformed:
            scanner.fail()


def _read_call(scanner: Scanner) -> Steps[None]:
    if (yield from scanner.space()) == "{":
        yield from read_call_object(scanner, _ENDS)
        return
    name, mark = yield from scanner.raw_until((_SEPARATOR, "\n", "{", _FENCE, _CLOSE), MAX_NAME)
    if mark == _SEPARATOR:
        yield from _read_separated(scanner, name)
        return
    # Without the mark, only a declared name is one; the word that stands before the mark may stand before it.
    if not scanner.is_declared(name) and name.strip().startswith(_KIND):
        name = name.strip().removeprefix(_KIND)
        if not name and mark == "\n":
            name, mark = yield from scanner.raw_until(("\n", "{", _FENCE, _CLOSE), MAX_NAME)
    if not scanner.is_declared(name):
        raise Malformed
    scanner.skip(-len(mark))
    yield from _read_rest(scanner, name)


def _read_separated(scanner: Scanner, name: str) -> Steps[None]:
    """From behind the mark, before which the name stands (V3.1) or the word for its kind (V3)."""
    character = yield from scanner.space()
    if character not in ("{", "`") and (yield from scanner.look_at(_ENDS)) is None and character:
        # The name stands on a line of its own, and the fence may be left out.
        name, mark = yield from scanner.raw_until(("\n", "{", _FENCE), MAX_NAME)
        scanner.skip(-len(mark))
    elif name.strip() == _KIND and not scanner.is_declared(name):
        raise Malformed
    yield from _read_rest(scanner, name)


def _read_rest(scanner: Scanner, name: str) -> Steps[None]:
    """The arguments, in a fence or not, and the end of the call."""
    fenced = yield from scanner.accept(_FENCE, spaced=True)
    if fenced:
        yield from scanner.accept("json")
        drop_begun(scanner, ("json",))
    drop_begun(scanner, (_FENCE,))
    character = yield from scanner.space()
    bare = not character or (yield from scanner.look_at(_ENDS)) is not None
    if not bare and character != "{":
        raise Malformed
    scanner.start_call(name)
    if bare:
        if not scanner.cut:
            scanner.arguments("{}")
        scanner.end_call()
        return
    yield from read_arguments(scanner, scanner.arguments, _ENDS, fence=_FENCE)
    scanner.end_call()
    yield from scanner.accept(_FENCE, spaced=True)
    drop_begun(scanner, (_FENCE,))


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

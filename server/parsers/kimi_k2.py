"""Calls of Kimi K2: an id that holds the name, `functions.get_weather:0`, then the arguments as JSON.

The id is the call's own: the template writes it back, and the model counts on from it over the conversation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any

from engine.text.schema_types import SchemaTypes
from server.parsers.base import MAX_NAME, Malformed, Scanner, Steps, ToolFamily
from server.parsers.call_objects import close_call
from server.parsers.formats import Format, const, schema_of, sequence, tags
from server.parsers.json_text import read_arguments, read_json
from server.parsers.tagged import drop_begun

_ALL_OPEN, _ALL_CLOSE = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
# Written by some conversions of the model.
_ALSO_OPEN, _ALSO_CLOSE = "<|tool_call_section_begin|>", "<|tool_call_section_end|>"
_OPEN, _ARGUMENTS, _CLOSE = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
_ENDS = (_CLOSE, _ALL_CLOSE, _ALSO_CLOSE, _OPEN)
_MARKERS = (_ALL_OPEN, _ALL_CLOSE, _ALSO_OPEN, _ALSO_CLOSE, _OPEN, _ARGUMENTS, _CLOSE)
_MAX_NOISE = 1024
_ID = re.compile(r"(?:functions\.)?([\w.\-]+?)(?::(\d+))?")


def _run(scanner: Scanner) -> Steps[None]:
    used: set[str] = set()
    while marker := (yield from scanner.until((_ALL_OPEN, _ALSO_OPEN, _OPEN), scanner.content)):
        try:
            if marker != _OPEN:
                # What else stands in the section is nobody's.
                _, found = yield from scanner.raw_until((_OPEN, _ALL_CLOSE, _ALSO_CLOSE), _MAX_NOISE)
                if found != _OPEN:
                    scanner.settle()
                    continue
            yield from _read_call(scanner, used)
            yield from close_call(scanner, _CLOSE)
        except Malformed:
            scanner.fail()
            continue
        for end in (_ALL_CLOSE, _ALSO_CLOSE):
            yield from scanner.accept(end, spaced=True)
        drop_begun(scanner, _ENDS)


def _read_call(scanner: Scanner, used: set[str]) -> Steps[None]:
    written, mark = yield from scanner.raw_until((_ARGUMENTS, "{"), MAX_NAME)
    found = _ID.fullmatch(written.strip())
    if found is None:
        raise Malformed
    if mark == "{":
        if not scanner.is_declared(found[1]):
            raise Malformed
        scanner.skip(-1)
    if found[0].isdigit() and not scanner.is_declared(found[0]):
        yield from _read_numbered(scanner)
        return
    call_id = f"functions.{found[1]}:{found[2]}" if found[2] else None
    if call_id in used:
        call_id = None
    used.add(call_id or "")
    scanner.start_call(found[1], call_id)
    if (yield from scanner.space()) == "{":
        yield from read_arguments(scanner, scanner.arguments, _ENDS)
    else:
        scanner.arguments((yield from _read_other(scanner)))
    scanner.end_call()


def _read_numbered(scanner: Scanner) -> Steps[None]:
    """A call whose id is its number alone: of the only tool, or of the only one that takes such arguments."""
    tools = scanner.tools or {}
    if (yield from scanner.space()) != "{" or not tools:
        raise Malformed
    if len(tools) == 1:
        scanner.start_call(next(iter(tools)))
        yield from read_arguments(scanner, scanner.arguments, _ENDS)
        scanner.end_call()
        return
    pieces: list[str] = []
    yield from read_json(scanner, pieces.append)
    text = "".join(pieces)
    keys = json.loads(text).keys()
    fitting = [name for name, schema in tools.items() if _takes(schema, keys)]
    if len(fitting) != 1:
        raise Malformed
    scanner.start_call(fitting[0])
    scanner.arguments(text)
    scanner.end_call()


def _takes(schema: Any, keys: Collection[str]) -> bool:
    """Whether a tool takes these parameters, and needs no others."""
    required = schema.get("required") if isinstance(schema, dict) else None
    needed = required if isinstance(required, list) else []
    known = SchemaTypes(schema).properties()
    return all(key in known for key in keys) and all(key in keys for key in needed)


def _read_other(scanner: Scanner) -> Steps[str]:
    """What stands in place of the arguments' object; nothing is an empty one."""
    pieces: list[str] = []
    marker = yield from scanner.until(_ENDS, pieces.append)
    if marker is not None:
        scanner.skip(-len(marker))
    text = "".join(pieces).strip()
    return text or ("" if marker is None and scanner.cut else "{}")


def _call_format(tools: list[tuple[str, dict[str, Any]]], parallel: bool) -> Format:
    calls: list[Format] = [
        {
            "type": "tag",
            "begin": f"{_OPEN}functions.{name}:",
            "content": sequence(
                {"type": "regex", "pattern": "0|[1-9][0-9]{0,2}"}, const(_ARGUMENTS), schema_of(schema)
            ),
            "end": _CLOSE,
        }
        for name, schema in tools
    ]
    return sequence(const(_ALL_OPEN), tags(calls, "", parallel), const(_ALL_CLOSE))


FAMILY = ToolFamily("kimi_k2", _run, _MARKERS, _call_format)

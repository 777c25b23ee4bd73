"""Tool calls of Mistral: `[TOOL_CALLS][{"name": ..., "arguments": {...}}]`, and since v11 `[TOOL_CALLS]name{...}`.

Their ids are nine letters or digits: the templates refuse any other when the conversation goes on.
"""

from __future__ import annotations

import re
import secrets
import string
from typing import Any

from server.parsers.base import SPACE, Malformed, Scanner, Steps, ToolFamily
from server.parsers.call_objects import close_call, read_call_list, read_call_object
from server.parsers.formats import json_call, schema_of, tags
from server.parsers.json_text import read_arguments
from server.parsers.pythonic import is_python_call, read_python_call
from server.parsers.tagged import drop_begun

_OPEN, _CLOSE, _ARGUMENTS, _ID = "[TOOL_CALLS]", "[/TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
_ENDS = (_CLOSE, _OPEN)
_LETTERS = string.ascii_letters + string.digits
_NAME = re.compile(r"[A-Za-z0-9_.\-]")


def _make_id() -> str:
    return "".join(secrets.choice(_LETTERS) for _ in range(9))


def _run(scanner: Scanner) -> Steps[None]:
    while (yield from scanner.until((_OPEN,), scanner.content)):
        try:
            while (yield from scanner.accept(_OPEN, spaced=True)):
                pass
            character = yield from scanner.space()
            if character == "[":
                yield from read_call_list(scanner, _ENDS)
            elif character == "{":
                yield from _read_objects(scanner)
            else:
                yield from _read_named(scanner)
            yield from close_call(scanner, _CLOSE)
        except Malformed:
            scanner.fail()


def _read_objects(scanner: Scanner) -> Steps[None]:
    """One call, or several whose brackets are missing."""
    while True:
        yield from read_call_object(scanner, _ENDS)
        character, distance = yield from scanner.look_past(SPACE + ",")
        if character != "{":
            return
        scanner.begin()
        scanner.skip(distance)


def _read_named(scanner: Scanner) -> Steps[None]:
    if (yield from is_python_call(scanner)):
        yield from read_python_call(scanner)
        return
    name = yield from scanner.word(_NAME)
    if (yield from scanner.accept(_ID, spaced=True)):
        yield from scanner.space()
        yield from scanner.word(_NAME)
    marked = yield from scanner.accept(_ARGUMENTS, spaced=True)
    drop_begun(scanner, (_ARGUMENTS, _ID))
    if (yield from scanner.space()) == "{":
        scanner.start_call(name)
        yield from read_arguments(scanner, scanner.arguments, _ENDS)
    elif marked:
        scanner.start_call(name)
        if (yield from scanner.look_at(_ENDS)) is not None or (not (yield from scanner.peek()) and not scanner.cut):
            scanner.arguments("{}")
        yield from scanner.before(_ENDS, scanner.arguments)
    elif (yield from scanner.peek()) == "[" and (yield from scanner.look_past(SPACE, 1))[0] == "{":
        # A word that stands before a list is none of its names.
        yield from read_call_list(scanner, _ENDS)
        return
    elif scanner.is_declared(name) and (
        not (yield from scanner.peek()) or (yield from scanner.look_at(_ENDS)) is not None
    ):
        scanner.start_call(name)
        if not scanner.cut:
            scanner.arguments("{}")
    else:
        raise Malformed
    scanner.end_call()


def _list_format(tools: list[tuple[str, dict[str, Any]]], parallel: bool) -> dict[str, Any]:
    calls = tags([json_call("", name, "arguments", schema, "") for name, schema in tools], ", ", parallel)
    return {"type": "tag", "begin": f"{_OPEN}[", "content": calls, "end": "]"}


def _named_format(tools: list[tuple[str, dict[str, Any]]], parallel: bool) -> dict[str, Any]:
    calls = [
        {"type": "tag", "begin": f"{_OPEN}{name}{_ARGUMENTS}", "content": schema_of(schema), "end": ""}
        for name, schema in tools
    ]
    return tags(calls, "", parallel)


FAMILY = ToolFamily("mistral", _run, (_OPEN, _CLOSE, _ARGUMENTS, _ID), _list_format, _make_id)
# Reads the same; what it forces is the newer way.
NAMED_FAMILY = ToolFamily("mistral_v11", _run, (_OPEN, _CLOSE, _ARGUMENTS, _ID), _named_format, _make_id)

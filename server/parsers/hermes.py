"""Tool calls of Hermes, Qwen 2.5 and Qwen 3: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, repeated.

Small models fall back on what else they have seen: other tags, a fence, no tag at all. There only the name of a
declared tool makes a call.
"""

from __future__ import annotations

from typing import Any

from server.parsers.base import SPACE, Malformed, Scanner, Steps, ToolFamily
from server.parsers.call_objects import NAME_CHARACTERS, close_call, read_call_list, read_call_object
from server.parsers.formats import json_call, tags
from server.parsers.json_text import read_arguments
from server.parsers.pythonic import read_python_call
from server.parsers.qwen3_coder import TAGS
from server.parsers.tagged import drop_begun, read_tagged_call

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_ENDS = (_CLOSE, _OPEN)
_FENCE = "```"
# Of other formats, by what ends them.
_OTHERS = {f"<{name}>": f"</{name}>" for name in ("tools", "tool", "function_call", "function_calls")}


def _run(scanner: Scanner) -> Steps[None]:
    character, distance = yield from scanner.look_past(SPACE)
    if character in ("{", "[", "`"):
        scanner.content(scanner.text[scanner.at : scanner.at + distance])
        scanner.skip(distance)
        scanner.begin()
        yield from _read_unmarked(scanner, _CLOSE)
    while marker := (yield from scanner.until((_OPEN, *_OTHERS, *TAGS.calls), scanner.content)):
        if marker == _OPEN:
            yield from _read_marked(scanner)
        elif marker in _OTHERS:
            yield from _read_unmarked(scanner, _OTHERS[marker])
        else:
            yield from _read_function(scanner, marker)


def _read_marked(scanner: Scanner) -> Steps[None]:
    """What stands behind the tag, and its end."""
    try:
        while (yield from scanner.accept(_OPEN, spaced=True)):
            pass
        if (yield from scanner.accept(_FENCE, spaced=True)):
            yield from scanner.accept("json")
        character = yield from scanner.space()
        if not character and scanner.num_calls:
            # Written in place of the end of the last call.
            scanner.settle()
            return
        if character == "[":
            yield from read_call_list(scanner, _ENDS)
        elif character == "{":
            yield from _read_objects(scanner)
        elif character == "<":
            yield from _read_other_tags(scanner)
        else:
            yield from _read_named(scanner)
        yield from scanner.accept(_FENCE, spaced=True)
        # Models that end with their last brace are understood, and those that close twice.
        while (yield from close_call(scanner, _CLOSE)):
            pass
        drop_begun(scanner, (_CLOSE,))
    except Malformed:
        scanner.fail()


def _read_objects(scanner: Scanner) -> Steps[None]:
    """One call, or several in one tag."""
    if (yield from scanner.look_at(("{{",))) is not None:
        # Braces that were escaped for a template.
        scanner.skip(1)
    while True:
        yield from read_call_object(scanner, _ENDS)
        character, distance = yield from scanner.look_past(SPACE + ",;")
        if character != "{":
            return
        scanner.begin()
        scanner.skip(distance)


def _read_other_tags(scanner: Scanner) -> Steps[None]:
    """Calls as Qwen3-Coder writes them in the same tag."""
    while True:
        for begin in TAGS.calls:
            if (yield from scanner.accept(begin, spaced=True)):
                yield from read_tagged_call(scanner, TAGS, begin)
                break
        else:
            if scanner.num_calls and not scanner.has_begun:
                return
            raise Malformed


def _read_named(scanner: Scanner) -> Steps[None]:
    """A declared name, then its arguments as an object, in brackets or not."""
    _, distance = yield from scanner.look_past(NAME_CHARACTERS)
    name = scanner.text[scanner.at : scanner.at + distance]
    if not scanner.is_declared(name):
        raise Malformed
    if (yield from scanner.look_at(("(",), distance)) is not None:
        yield from read_python_call(scanner)
        return
    scanner.skip(distance)
    if (yield from scanner.space()) != "{":
        raise Malformed
    scanner.start_call(name)
    yield from read_arguments(scanner, scanner.arguments, _ENDS)
    scanner.end_call()


def _read_unmarked(scanner: Scanner, end: str) -> Steps[None]:
    """Calls of declared tools where nothing else says that they are calls; anything else is content."""
    try:
        fenced = yield from scanner.accept(_FENCE, spaced=True)
        if fenced:
            yield from scanner.accept("json")
        if (yield from scanner.space()) == "[":
            yield from read_call_list(scanner, (), unmarked=True)
        elif (yield from scanner.peek()) == "<":
            for begin in TAGS.calls:
                if (yield from scanner.accept(begin)):
                    yield from read_tagged_call(scanner, TAGS, begin, declared=True)
                    break
            else:
                raise Malformed
        else:
            while True:
                yield from read_call_object(scanner, only_known_keys=True, declared=True)
                character, distance = yield from scanner.look_past(SPACE + ",;")
                if character != "{":
                    break
                scanner.begin()
                scanner.skip(distance)
        if fenced:
            yield from scanner.accept(_FENCE, spaced=True)
        yield from close_call(scanner, end)
    except Malformed:
        scanner.fail()


def _read_function(scanner: Scanner, begin: str) -> Steps[None]:
    try:
        yield from read_tagged_call(scanner, TAGS, begin, declared=True)
        yield from close_call(scanner, _CLOSE)
    except Malformed:
        scanner.fail()


def _call_format(tools: list[tuple[str, dict[str, Any]]], parallel: bool) -> dict[str, Any]:
    calls = [json_call(_OPEN + "\n", name, "arguments", schema, "\n" + _CLOSE) for name, schema in tools]
    return tags(calls, "\n", parallel)


FAMILY = ToolFamily("hermes", _run, (_OPEN, _CLOSE), _call_format)

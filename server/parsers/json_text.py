"""JSON inside of a model's output, read character by character: checked, and handed on as it was written.

A slip in the arguments of a call does not undo it: from there on its text goes on unchecked, for the client to mend.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import cache
from typing import NoReturn

from server.parsers.base import MAX_JSON_DEPTH, MAX_NAME, SPACE, Malformed, Scanner, Sink, Steps

_SURROGATE = re.compile("[\ud800-\udfff]")
_HEX = re.compile(r"[0-9a-fA-F]{4}")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_NUMBER_CHARACTERS = "+-.0123456789eE"
_LITERALS = {"t": "true", "f": "false", "n": "null"}
# The fields of a call beside its arguments.
NAME_KEYS = ("name", "tool_name", "function", "function_name", "tool")
OTHER_KEYS = ("id", "type", "index")
# A key that may stand behind the arguments.
_NEXT_KEYS = tuple(f'"{key}"' for key in (*NAME_KEYS, *OTHER_KEYS))
# The end of a text may be the end of the arguments, of what is around them, or neither.
_TAIL_CHARACTERS = SPACE + "}]`"
_MAX_TAIL = 256


@dataclass(slots=True)
class _Nesting:
    """Where in a value the reading stands: brackets to be closed, and the quote of the string."""

    closers: list[str] = field(default_factory=list)
    quote: str = ""


def read_json(scanner: Scanner, sink: Sink) -> Steps[None]:
    """One JSON value. Its text goes to the sink in pieces that together are valid JSON. Malformed where it is none.

    Line breaks and tabs inside of strings, which models write and JSON forbids, are escaped.
    """
    yield from _read_value(scanner, sink, _Nesting(), ())


def read_arguments(
    scanner: Scanner, sink: Sink, ends: tuple[str, ...] = (), *, outer: str = "", fence: str = ""
) -> Steps[bool]:
    """One value, whatever is wrong inside of it: from the first slip on its text goes on as it is.

    ends: texts before which a call ends, its own end mark first; none of them is read. outer: the brackets that close
    around the value, fence: what may stand before its end mark; neither is part of it. Returns whether the value ended
    by itself: then what is around it comes next, else one of the ends or the end of the text.
    """
    nesting = _Nesting()
    try:
        yield from _read_value(scanner, sink, nesting, ends)
    except Malformed:
        return (yield from _read_raw(scanner, sink, nesting, ends, outer, fence))
    return True


def read_members(scanner: Scanner, sink: Sink, ends: tuple[str, ...], *, outer: str) -> Steps[bool]:
    """As read_arguments, from the first value of an object on: its bracket and key have been read and handed on."""
    nesting = _Nesting(["}"])
    try:
        yield from _read_value(scanner, sink, nesting, ends)
    except Malformed:
        return (yield from _read_raw(scanner, sink, nesting, ends, outer, ""))
    return True


def _read_value(scanner: Scanner, sink: Sink, nesting: _Nesting, ends: tuple[str, ...]) -> Steps[None]:
    closers = nesting.closers
    # What may come: a value, a value or "]", a key, a key or "}", or what follows a value.
    expected = "value"
    while True:
        character = yield from scanner.peek()
        if not character:
            raise Malformed
        if character in SPACE:
            _pass(scanner, sink, 1)
            continue
        if expected == "after":
            if character == ",":
                _pass(scanner, sink, 1)
                expected = "key" if closers[-1] == "}" else "value"
                continue
            if character != closers[-1]:
                raise Malformed
            _pass(scanner, sink, 1)
            closers.pop()
        elif character in "]}" and expected == f"value or {character}":
            _pass(scanner, sink, 1)
            closers.pop()
        elif expected in ("key", "value or }"):
            if character != '"':
                raise Malformed
            yield from _read_string(scanner, sink, nesting, ends)
            while (character := (yield from scanner.peek())) and character in SPACE:
                _pass(scanner, sink, 1)
            if character != ":":
                raise Malformed
            _pass(scanner, sink, 1)
            expected = "value"
            continue
        elif character in "{[":
            if len(closers) == MAX_JSON_DEPTH:
                raise Malformed
            closers.append("}" if character == "{" else "]")
            _pass(scanner, sink, 1)
            expected = f"value or {closers[-1]}"
            continue
        elif character == '"':
            yield from _read_string(scanner, sink, nesting, ends)
        elif character in _LITERALS:
            literal = _LITERALS[character]
            if not (yield from scanner.accept(literal)):
                if scanner.closed and literal.startswith(scanner.text[scanner.at :]):
                    _cut_off(scanner, sink)
                raise Malformed
            sink(literal)
        else:
            yield from _read_number(scanner, sink)
        if not closers:
            return
        expected = "after"


def _cut_off(scanner: Scanner, sink: Sink) -> NoReturn:
    """The text ends inside of a value: what there is of it belongs to the arguments, as the rest did."""
    _pass(scanner, sink, len(scanner.text) - scanner.at)
    raise Malformed


def _pass(scanner: Scanner, sink: Sink, count: int) -> None:
    """Read some characters and hand them on. Read first: the sink may settle what was read."""
    text = scanner.text[scanner.at : scanner.at + count]
    scanner.at += count
    sink(text)


def _read_string(scanner: Scanner, sink: Sink, nesting: _Nesting, ends: tuple[str, ...]) -> Steps[None]:
    """A string that was never closed reads over the end of its call: so an end mark with nothing but another one
    behind it ends it, and so do the brackets in front of that, which are none of the string's."""
    nesting.quote = '"'
    _pass(scanner, sink, 1)
    pattern = _plain_without(ends)
    while True:
        character = yield from scanner.peek()
        if not character:
            raise Malformed
        plain = pattern.match(scanner.text, scanner.at)
        if plain is not None:
            _pass(scanner, sink, len(plain[0]))
        elif character == '"':
            nesting.quote = ""
            _pass(scanner, sink, 1)
            return
        elif character == "\\":
            yield from _read_escape(scanner, sink)
        elif character < " ":
            scanner.at += 1
            sink(json_escaped(character))
        else:
            size = 1
            if character in "}]":
                following, size = yield from scanner.look_past(SPACE + "}]")
                if not following and size < _MAX_TAIL:
                    raise Malformed
            found = yield from scanner.look_at(ends, size if character in "}]" else 0)
            if found is not None and (
                yield from _is_followed_by_end(scanner, (size if character in "}]" else 0) + len(found), ends)
            ):
                raise Malformed
            text = scanner.text[scanner.at : scanner.at + size]
            scanner.at += size
            sink(json_escaped(text))


@cache
def _plain_without(ends: tuple[str, ...]) -> re.Pattern[str]:
    """Text of a string in which neither one of the ends can begin, nor brackets in front of one."""
    firsts = "".join({re.escape(end[0]) for end in ends})
    return re.compile(r'[^"\\\x00-\x1f' + (r"}\]" + firsts if ends else "") + "]+")


def _is_followed_by_end(scanner: Scanner, distance: int, ends: tuple[str, ...]) -> Steps[bool]:
    """Whether from so far away on, white space aside, one of the ends follows, or nothing."""
    character, distance = yield from scanner.look_past(SPACE, distance)
    return not character or (yield from scanner.look_at(ends, distance)) is not None


def _read_escape(scanner: Scanner, sink: Sink) -> Steps[None]:
    """An escape goes out whole, so that every piece of a string can be shown."""
    size = 2
    while len(found := scanner.text[scanner.at : scanner.at + size]) < size:
        if scanner.closed:
            _cut_off(scanner, sink)
        yield
    if found[1] == "u":
        size = 6
        while len(found := scanner.text[scanner.at : scanner.at + size]) < size:
            if scanner.closed:
                _cut_off(scanner, sink)
            yield
        if not _HEX.fullmatch(found[2:]):
            raise Malformed
    elif found[1] not in '"\\/bfnrt':
        raise Malformed
    _pass(scanner, sink, size)


def _read_number(scanner: Scanner, sink: Sink) -> Steps[None]:
    following, size = yield from scanner.look_past(_NUMBER_CHARACTERS)
    if not following and size:
        _cut_off(scanner, sink)
    if size > MAX_NAME or not _NUMBER.fullmatch(scanner.text, scanner.at, scanner.at + size):
        raise Malformed
    _pass(scanner, sink, size)


def _read_raw(
    scanner: Scanner, sink: Sink, nesting: _Nesting, ends: tuple[str, ...], outer: str, fence: str
) -> Steps[bool]:
    """What is left of a value behind a slip; see read_arguments. Brackets and quotes are followed as well as may be."""
    closers, quote = nesting.closers, nesting.quote
    # Brackets and space at the end, which may belong to what is around the value, and how deep it was before them.
    tail, depth = "", len(closers)
    before = ""
    while character := (yield from scanner.peek()):
        if ends and (yield from scanner.look_at(ends)) is not None:
            break
        scanner.skip(1)
        if character in _TAIL_CHARACTERS and len(tail) < _MAX_TAIL:
            depth = depth if tail else len(closers)
            tail += character
        else:
            sink(tail + character)
            tail = ""
        if quote:
            if character == "\\":
                escaped = yield from scanner.peek()
                scanner.skip(len(escaped))
                sink(escaped)
            elif character == quote:
                quote = ""
        elif character == '"' or (character == "'" and before in ",:{[("):
            quote = character
        elif character in "{[":
            closers.append("}" if character == "{" else "]")
        elif character in "}]":
            if closers:
                closers.pop()
            if not closers and (yield from _is_end(scanner, ends, outer)):
                sink(tail)
                return True
        if character not in SPACE:
            before = character
    tail = tail.rstrip()
    if fence and tail.endswith(fence):
        tail = tail.removesuffix(fence).rstrip()
    kept = ""
    for character in tail:
        if character in "}]":
            if not depth:
                break
            depth -= 1
        kept += character
    sink(kept.rstrip())
    return False


def _is_end(scanner: Scanner, ends: tuple[str, ...], outer: str) -> Steps[bool]:
    """Whether what comes next may follow a value: the brackets around it and an end, or another field."""
    if outer:
        character, distance = yield from scanner.look_past(SPACE)
        if character == ",":
            _, distance = yield from scanner.look_past(SPACE, distance + 1)
            return (yield from scanner.look_at(_NEXT_KEYS, distance)) is not None
    distance = 0
    for bracket in outer:
        character, distance = yield from scanner.look_past(SPACE, distance)
        if character == "," and bracket == "]":
            # The next of a list.
            return (yield from scanner.look_past(SPACE, distance + 1))[0] == "{"
        if character and character != bracket:
            return False
        distance += len(character)
    return (yield from _is_followed_by_end(scanner, distance, ends)) if ends else True


def read_json_string(scanner: Scanner) -> Steps[str]:
    """A JSON string, decoded."""
    if (yield from scanner.peek()) != '"':
        raise Malformed
    pieces: list[str] = []
    yield from _read_string(scanner, pieces.append, _Nesting(), ())
    value: str = json.loads("".join(pieces))
    return value


def json_escaped(text: str) -> str:
    """Text as it stands inside of a string of JSON; halves of surrogate pairs as escapes."""
    escaped = json.dumps(text, ensure_ascii=False)[1:-1]
    if escaped.isascii() or not _SURROGATE.search(escaped):
        return escaped
    return json.dumps(text)[1:-1]

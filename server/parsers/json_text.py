"""JSON inside of a model's output, read character by character: checked, and handed on as it was written.

The families' grammars use it for arguments, which stream, and for the object around them, which does not. A slip in
the arguments of a call does not undo it: from there on its text goes on unchecked, for the client to mend.
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
_BARE_KEY = re.compile(r"\w")
_NAME_KEYS = ("name", "tool_name", "function")
_ARGUMENT_KEYS = ("arguments", "parameters")
_OTHER_KEYS = ("id", "type", "index")
# A key that may stand behind the arguments.
_NEXT_KEYS = tuple(f'"{key}"' for key in (*_NAME_KEYS, *_OTHER_KEYS))
# The end of a text may be the end of the arguments, of what is around them, or neither.
_TAIL_CHARACTERS = SPACE + "}]`"
_MAX_TAIL = 256
# Behind arguments, what is neither a field nor an end is left out, up to so many characters.
_MAX_JUNK = 4096


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


def read_call_object(
    scanner: Scanner, ends: tuple[str, ...] = (), *, only_known_keys: bool = False, around: str = ""
) -> Steps[None]:
    """`{"name": ..., "arguments": {...}}` in any order of its keys, as one call. Malformed where it is none.

    Arguments stream when the name stands before them. ends: see read_arguments; around: brackets that close around the
    object. only_known_keys: an unknown key makes it an ordinary object, for families that have no mark before a call.
    """
    reader = _CallReader(scanner, ends, only_known_keys, around)
    yield from scanner.expect("{")
    try:
        yield from reader.read_fields(1)
    except Malformed:
        if not scanner.has_begun:
            # The text ends in a call of which only the name is known.
            if only_known_keys or not reader.name or not scanner.closed or (yield from scanner.peek()):
                raise
            scanner.start_call(reader.name)
            if not scanner.cut:
                scanner.arguments("{}")
        yield from _skip_junk(scanner, ends)
    scanner.end_call()


def read_call_list(scanner: Scanner, ends: tuple[str, ...]) -> Steps[None]:
    """`[{"name": ..., "arguments": {...}}, ...]`. Malformed where its first element is no call; others are left out."""
    yield from scanner.expect("[")
    while True:
        yield from scanner.space()
        yield from read_call_object(scanner, ends, around="]")
        while True:
            character, distance = yield from scanner.look_past(SPACE + ",")
            if character == "{":
                scanner.begin()
                scanner.skip(distance)
                break
            if not character or (yield from scanner.look_at(ends, distance)) is not None:
                return
            scanner.skip(distance + 1)
            scanner.settle()
            if character == "]":
                return


def close_call(scanner: Scanner, close: str) -> Steps[bool]:
    """Read the end mark of a call if it comes next, with a bracket too many before it or not."""
    _, distance = yield from scanner.look_past(SPACE + "}]")
    if (yield from scanner.look_at((close,), distance)) is None:
        return False
    scanner.skip(distance + len(close))
    return True


class _CallReader:
    """Reads the fields of one call."""

    def __init__(self, scanner: Scanner, ends: tuple[str, ...], only_known_keys: bool, around: str) -> None:
        self.name = ""
        self._scanner = scanner
        self._ends = ends
        self._only_known_keys = only_known_keys
        self._around = around

    def read_fields(self, depth: int) -> Steps[None]:
        """The fields of an object, whose bracket has been read, up to its end. Malformed where they stop being some."""
        scanner = self._scanner
        arguments: str | None = None
        yield from scanner.space()
        while True:
            # Arguments whose key is missing.
            bare = bool(self.name) and not self._only_known_keys and (yield from scanner.peek()) == "{"
            key = _ARGUMENT_KEYS[0] if bare else (yield from self._read_key())
            if not bare:
                yield from scanner.space()
                yield from scanner.expect(":")
            character = yield from scanner.space()
            if scanner.has_begun:
                yield from read_json(scanner, _drop)
            elif key in _NAME_KEYS and not self.name and character and character in "\"'":
                self.name = yield from self._read_name(character)
            elif key == "function" and not self.name and character == "{":
                scanner.skip(1)
                yield from self.read_fields(depth + 1)
            elif key in _ARGUMENT_KEYS and arguments is None:
                arguments = yield from self._read_arguments(character, depth)
            elif key in _OTHER_KEYS or not self._only_known_keys:
                yield from read_json(scanner, _drop)
            else:
                raise Malformed
            character = yield from scanner.space()
            if character == ",":
                scanner.skip(1)
                character = yield from scanner.space()
            elif character != "}" and (self._only_known_keys or character not in ('"', "'")):
                raise Malformed
            if character == "}":
                break
        scanner.skip(1)
        if not scanner.has_begun:
            if not self.name:
                raise Malformed
            scanner.start_call(self.name)
            scanner.arguments("{}" if arguments is None else arguments)

    def _read_key(self) -> Steps[str]:
        scanner = self._scanner
        character = yield from scanner.peek()
        if character == '"':
            return (yield from read_json_string(scanner))
        if self._only_known_keys:
            raise Malformed
        if character == "'":
            return (yield from self._read_name(character))
        return (yield from scanner.word(_BARE_KEY))

    def _read_name(self, quote: str) -> Steps[str]:
        scanner = self._scanner
        if quote == '"':
            return (yield from read_json_string(scanner))
        scanner.skip(1)
        found = ""
        while (character := (yield from scanner.peek())) != quote:
            if not character or len(found) > MAX_NAME:
                raise Malformed
            scanner.skip(1)
            found += character
        scanner.skip(1)
        return found

    def _read_arguments(self, character: str, depth: int) -> Steps[str]:
        """The arguments, where they cannot stream: they come before the name, or as a string of JSON, or as null."""
        scanner = self._scanner
        if character and character in "\"'":
            text = yield from self._read_quoted(character)
            if self._only_known_keys and not _is_object(text):
                raise Malformed
            return text if text.strip() else "{}"
        if character == "n" and (yield from scanner.accept("null")):
            return "{}"
        if self._only_known_keys and character != "{":
            raise Malformed
        outer = "}" * depth + self._around
        if self.name and character in ("{", "["):
            scanner.start_call(self.name)
            if not (yield from read_arguments(scanner, scanner.arguments, self._ends, outer=outer)):
                raise Malformed
            return ""
        pieces: list[str] = []
        if character in ("{", "["):
            yield from read_arguments(scanner, pieces.append, self._ends, outer=outer)
        else:
            yield from read_json(scanner, pieces.append)
        return "".join(pieces)

    def _read_quoted(self, quote: str) -> Steps[str]:
        """Arguments in a string. One that is cut off makes the call with what there is, where its name is known."""
        scanner = self._scanner
        scanner.skip(1)
        pieces: list[str] = []
        while (character := (yield from scanner.peek())) != quote:
            if not character:
                if self.name:
                    scanner.start_call(self.name)
                    scanner.arguments(_unquoted("".join(pieces), quote))
                raise Malformed
            scanner.skip(1)
            pieces.append(character)
            if character == "\\":
                escaped = yield from scanner.peek()
                scanner.skip(len(escaped))
                pieces.append(escaped)
        scanner.skip(1)
        return _unquoted("".join(pieces), quote)


def _unquoted(text: str, quote: str) -> str:
    """The text of a string; with a slip in it, as it was written but for its quotes' escapes."""
    if quote == '"':
        try:
            value: str = json.loads(f'"{text}"', strict=False)
        except ValueError:
            return text.replace('\\"', '"')
        return value
    return text.replace("\\'", "'")


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _skip_junk(scanner: Scanner, ends: tuple[str, ...]) -> Steps[None]:
    """Leave out what stands between a call's arguments and its end mark."""
    if not ends:
        return
    scanner.begin()
    try:
        text, _ = yield from scanner.raw_until(ends, _MAX_JUNK)
    except Malformed:
        scanner.rewind()
        if scanner.closed and len(scanner.text) - scanner.at <= _MAX_JUNK:
            scanner.skip(len(scanner.text) - scanner.at)
    else:
        scanner.rewind()
        scanner.skip(len(text))
    scanner.settle()


def json_escaped(text: str) -> str:
    """Text as it stands inside of a string of JSON; halves of surrogate pairs as escapes."""
    escaped = json.dumps(text, ensure_ascii=False)[1:-1]
    if escaped.isascii() or not _SURROGATE.search(escaped):
        return escaped
    return json.dumps(text)[1:-1]


def _drop(text: str) -> None:
    """A sink for what nobody wants to know."""

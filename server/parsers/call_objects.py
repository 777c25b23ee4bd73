"""Calls as objects of JSON: `{"name": ..., "arguments": {...}}` and what models make of it, one or a list of them.

Arguments stream, the object around them does not.
"""

from __future__ import annotations

import json
import re
import string

from engine.text.schema_types import SchemaTypes, is_json
from server.parsers.base import MAX_JSON_DEPTH, MAX_NAME, SPACE, Malformed, Scanner, Steps
from server.parsers.json_text import (
    NAME_KEYS,
    OTHER_KEYS,
    read_arguments,
    read_json,
    read_json_string,
    read_members,
)

_BARE_KEY = re.compile(r"\w")
# Of a name, which may be a declared one however long that is.
_MAX_NAME = 4 * MAX_NAME
_BARE_NAME = re.compile(r"[A-Za-z0-9_.\-]")
NAME_CHARACTERS = string.ascii_letters + string.digits + "_.-"
_ARGUMENT_KEYS = ("arguments", "parameters")
# What models call them besides, where the tool has no parameter of that name.
_ALSO_ARGUMENTS = ("args", "input", "inputs", "params", "kwargs", "tool_input", "tool_args", "tool_arguments")
# Behind arguments, what is neither a field nor an end is left out, up to so many characters.
_MAX_JUNK = 4096


def read_call_object(
    scanner: Scanner,
    ends: tuple[str, ...] = (),
    *,
    only_known_keys: bool = False,
    declared: bool = False,
    around: str = "",
) -> Steps[None]:
    """`{"name": ..., "arguments": {...}}` in any order of its keys, as one call. Malformed where it is none.

    Arguments stream when the name stands before them; they may also stand beside the name, as parameters of the tool,
    and then they stream as well. ends: see read_arguments; around: brackets that close around the object.
    only_known_keys: an unknown key makes it an ordinary object, for families that have no mark before a call; declared:
    so does the name of no declared tool.
    """
    reader = _CallReader(scanner, ends, only_known_keys, declared, around)
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
                scanner.arguments(reader.beside())
        yield from _skip_junk(scanner, ends)
    scanner.end_call()


def read_call_list(scanner: Scanner, ends: tuple[str, ...], *, unmarked: bool = False) -> Steps[None]:
    """`[{"name": ..., "arguments": {...}}, ...]`. Malformed where its first element is no call; others are left out.

    unmarked: elements with unknown keys or of tools that nobody declared are no calls.
    """
    yield from scanner.expect("[")
    while True:
        yield from scanner.space()
        yield from read_call_object(scanner, ends, only_known_keys=unmarked, declared=unmarked, around="]")
        while True:
            character, distance = yield from scanner.look_past(SPACE + ",")
            if character == "{":
                scanner.begin()
                scanner.skip(distance)
                break
            if unmarked:
                yield from scanner.accept("]", spaced=True)
                return
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

    def __init__(
        self, scanner: Scanner, ends: tuple[str, ...], only_known_keys: bool, declared: bool, around: str
    ) -> None:
        self.name = ""
        self._scanner = scanner
        self._ends = ends
        self._only_known_keys = only_known_keys
        self._declared = declared
        self._around = around
        # Text by key of what is neither name nor arguments.
        self._beside: dict[str, str] = {}

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
            elif key in NAME_KEYS and not self.name and (yield from self._is_name(character)):
                self.name = yield from self._read_name(character)
                if self._declared and not scanner.is_declared(self.name):
                    raise Malformed
            elif key == "function" and not self.name and character == "{":
                if depth == MAX_JSON_DEPTH:
                    raise Malformed
                scanner.skip(1)
                yield from self.read_fields(depth + 1)
            elif arguments is None and self._is_arguments(key, character):
                arguments = yield from self._read_arguments(character, depth)
            elif self._is_parameter(key):
                yield from self._read_parameters(key, depth)
                return
            elif not self.name and not self._only_known_keys and character == "{" and scanner.is_declared(key):
                # The name is the key of the arguments.
                self.name = key
                yield from self._read_arguments(character, depth)
            elif key in OTHER_KEYS or not self._only_known_keys:
                yield from self._read_other(key, depth)
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
            scanner.arguments(self.beside() if arguments is None else arguments)

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

    def _is_name(self, character: str) -> Steps[bool]:
        """Whether the value of a key for the name is one: a string, or the bare name of a declared tool."""
        if character and character in "\"'":
            return True
        if self._only_known_keys or not _BARE_NAME.match(character):
            return False
        _, distance = yield from self._scanner.look_past(NAME_CHARACTERS)
        text = self._scanner.text
        return self._scanner.is_declared(text[self._scanner.at : self._scanner.at + distance])

    def _read_name(self, quote: str) -> Steps[str]:
        scanner = self._scanner
        if quote not in ("'", '"'):
            return (yield from scanner.word(_BARE_NAME))
        scanner.skip(1)
        found = ""
        while (character := (yield from scanner.peek())) != quote:
            if not character or len(found) > _MAX_NAME:
                raise Malformed
            scanner.skip(1)
            found += character
            if character == "\\":
                escaped = yield from scanner.peek()
                scanner.skip(len(escaped))
                found += escaped
        scanner.skip(1)
        return _unquoted(found, quote)

    def _is_arguments(self, key: str, character: str) -> bool:
        if key in _ARGUMENT_KEYS:
            return True
        is_known = self._scanner.is_declared(self.name)
        return key in _ALSO_ARGUMENTS and character == "{" and is_known and not self._is_parameter(key)

    def _is_parameter(self, key: str) -> bool:
        """Whether the key is that of a parameter of the tool that has been named, and no other field of a call."""
        if not self.name or key in OTHER_KEYS or not self._scanner.is_declared(self.name):
            return False
        return key in SchemaTypes(self._scanner.parameters(self.name)).properties()

    def _read_parameters(self, key: str, depth: int) -> Steps[None]:
        """Parameters beside the name: from this one on the rest of the object is the arguments."""
        scanner = self._scanner
        before = self.beside().removesuffix("}")
        scanner.start_call(self.name)
        scanner.arguments(f"{before}{', ' if before != '{' else ''}{json.dumps(key, ensure_ascii=False)}: ")
        outer = "}" * (depth - 1) + self._around
        if not (yield from read_members(scanner, scanner.arguments, self._ends, outer=outer)):
            raise Malformed

    def _read_other(self, key: str, depth: int) -> Steps[None]:
        """A field of no known meaning. A slip inside of it ends the object: there is no telling where it ends."""
        scanner = self._scanner
        pieces: list[str] = []
        if self._only_known_keys or not self.name:
            yield from read_json(scanner, pieces.append)
            self._beside[key] = "".join(pieces)
            return
        outer = "}" * depth + self._around
        is_whole = yield from read_arguments(scanner, pieces.append, self._ends, outer=outer)
        self._beside[key] = "".join(pieces)
        if not is_whole:
            scanner.start_call(self.name)
            scanner.arguments(self.beside())
            raise Malformed

    def beside(self) -> str:
        """The arguments as an object of what stands beside the name, where no key says that they are some."""
        known = SchemaTypes(self._scanner.parameters(self.name)).properties()
        fields = {key: text for key, text in self._beside.items() if key in known or key not in OTHER_KEYS}
        return "{" + ", ".join(f"{json.dumps(key, ensure_ascii=False)}: {fields[key]}" for key in fields) + "}"

    def _read_arguments(self, character: str, depth: int) -> Steps[str]:
        """The arguments, where they cannot stream: they come before the name, or as a string of JSON, or as null."""
        scanner = self._scanner
        if character and character in "\"'":
            text = yield from self._read_quoted(character)
            if self._only_known_keys and not _is_object(text):
                raise Malformed
            if not text.strip():
                return "{}"
            if text.lstrip().startswith(("{", "[")) or is_json(text):
                return text
            # It was never meant to be an object.
            return json.dumps(text, ensure_ascii=False)
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


def _drop(text: str) -> None:
    """A sink for what nobody wants to know."""

"""JSON inside of a model's output, read character by character: checked, and handed on as it was written.

The families' grammars use it for arguments, which stream, and for the object around them, which does not.
"""

from __future__ import annotations

import json
import re
from typing import NoReturn

from server.parsers.base import MAX_JSON_DEPTH, MAX_NAME, SPACE, Malformed, Scanner, Sink, Steps

_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
_HEX = re.compile(r"[0-9a-fA-F]{4}")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_NUMBER_CHARACTERS = "+-.0123456789eE"
_LITERALS = {"t": "true", "f": "false", "n": "null"}
_NAME_KEYS = ("name", "tool_name", "function")
_ARGUMENT_KEYS = ("arguments", "parameters")
_OTHER_KEYS = ("id", "type", "index")


def read_json(scanner: Scanner, sink: Sink) -> Steps[None]:
    """One JSON value. Its text goes to the sink in pieces that together are valid JSON. Malformed where it is none.

    Line breaks and tabs inside of strings, which models write and JSON forbids, are escaped.
    """
    closers: list[str] = []
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
            yield from _read_string(scanner, sink)
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
            yield from _read_string(scanner, sink)
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


def _read_string(scanner: Scanner, sink: Sink) -> Steps[None]:
    _pass(scanner, sink, 1)
    while True:
        character = yield from scanner.peek()
        if not character:
            raise Malformed
        plain = _PLAIN.match(scanner.text, scanner.at)
        if plain is not None:
            _pass(scanner, sink, len(plain[0]))
        elif character == '"':
            _pass(scanner, sink, 1)
            return
        elif character == "\\":
            yield from _read_escape(scanner, sink)
        else:
            scanner.at += 1
            sink(json.dumps(character)[1:-1])


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


def read_json_string(scanner: Scanner) -> Steps[str]:
    """A JSON string, decoded."""
    if (yield from scanner.peek()) != '"':
        raise Malformed
    pieces: list[str] = []
    yield from _read_string(scanner, pieces.append)
    value: str = json.loads("".join(pieces))
    return value


def read_call_object(scanner: Scanner, *, only_known_keys: bool = False) -> Steps[None]:
    """`{"name": ..., "arguments": {...}}` in any order of its keys, as one call. Malformed where it is none.

    Arguments stream when the name stands before them. only_known_keys: an unknown key makes it an ordinary object,
    for families that have no mark in front of a call.
    """
    yield from _read_fields(scanner, only_known_keys)
    scanner.end_call()


def _read_fields(scanner: Scanner, only_known_keys: bool) -> Steps[None]:
    yield from scanner.expect("{")
    name: str | None = None
    arguments: str | None = None
    started = False
    character = yield from scanner.space()
    while True:
        key = yield from read_json_string(scanner)
        yield from scanner.space()
        yield from scanner.expect(":")
        character = yield from scanner.space()
        if key in _NAME_KEYS and name is None and character == '"':
            name = yield from read_json_string(scanner)
        elif key == "function" and name is None and character == "{":
            yield from _read_fields(scanner, only_known_keys)
            started = True
            name = ""
        elif key in _ARGUMENT_KEYS and arguments is None and not started:
            if character == "{" and name:
                scanner.start_call(name)
                started = True
                yield from read_json(scanner, scanner.arguments)
            else:
                arguments = yield from _read_arguments(scanner, character)
        elif started or key in _OTHER_KEYS or not only_known_keys:
            yield from read_json(scanner, _drop)
        else:
            raise Malformed
        character = yield from scanner.space()
        if character == "}":
            break
        yield from scanner.expect(",")
        yield from scanner.space()
    scanner.skip(1)
    if not started:
        if not name:
            raise Malformed
        scanner.start_call(name)
        scanner.arguments("{}" if arguments is None else arguments)


def _read_arguments(scanner: Scanner, character: str) -> Steps[str]:
    """Arguments that cannot stream: they come before the name, or as a string of JSON, or as null."""
    if character == '"':
        text = yield from read_json_string(scanner)
        try:
            is_object = isinstance(json.loads(text), dict)
        except (ValueError, RecursionError):
            is_object = False
        if not is_object:
            raise Malformed
        return text
    if character == "n":
        yield from scanner.expect("null")
        return "{}"
    if character != "{":
        raise Malformed
    pieces: list[str] = []
    yield from read_json(scanner, pieces.append)
    return "".join(pieces)


def _drop(text: str) -> None:
    """A sink for what nobody wants to know."""

"""Tool calls of Llama 3.2 and 4 as Python: `[get_weather(city="Paris", days=3), now()]`, the whole output.

Each argument goes out when its value is complete: only then is it known what it is in JSON.
"""

from __future__ import annotations

import ast
import json
import math
import re
import warnings
from typing import Any

from server.parsers.base import MAX_JSON_DEPTH, SPACE, Malformed, Scanner, Steps, ToolFamily
from server.parsers.formats import Format, const, optional_fields, schema_of, sequence, tags

_OPEN, _CLOSE = "<|python_start|>", "<|python_end|>"
_NAME = re.compile(r"[\w.\-]")
_KEYWORD = re.compile(r"\w")
_MAX_VALUE = 1 << 20
# Parameters beyond these cannot be forced; a call stays valid without them.
_MAX_OPTIONAL = 16


def _run(scanner: Scanner) -> Steps[None]:
    character, distance = yield from scanner.look_past(SPACE)
    if character == "[":
        scanner.content(scanner.text[scanner.at : scanner.at + distance])
        scanner.skip(distance)
        scanner.begin()
        yield from _read_list(scanner)
    while (yield from scanner.until((_OPEN,), scanner.content)):
        yield from _read_list(scanner)
        yield from scanner.accept(_CLOSE, spaced=True)


def _read_list(scanner: Scanner) -> Steps[None]:
    """The list of calls; it has been begun."""
    try:
        yield from scanner.space()
        yield from scanner.expect("[")
        while True:
            yield from scanner.space()
            yield from _read_call(scanner)
            if (yield from scanner.accept("]", spaced=True)):
                return
            scanner.begin()
            yield from scanner.space()
            yield from scanner.expect(",")
    except Malformed:
        scanner.fail()


def _read_call(scanner: Scanner) -> Steps[None]:
    name = yield from scanner.word(_NAME)
    yield from scanner.expect("(")
    num_arguments = 0
    while (yield from scanner.space()) != ")":
        keyword = yield from scanner.word(_KEYWORD)
        yield from scanner.space()
        yield from scanner.expect("=")
        value = yield from _read_value(scanner)
        if (yield from scanner.peek()) == ",":
            scanner.skip(1)
        if not num_arguments:
            scanner.start_call(name)
        scanner.arguments(("{" if not num_arguments else ", ") + f"{json.dumps(keyword)}: {value}")
        num_arguments += 1
    scanner.skip(1)
    if not num_arguments:
        scanner.start_call(name)
    scanner.arguments("}" if num_arguments else "{}")
    scanner.end_call()


def _read_value(scanner: Scanner) -> Steps[str]:
    """A Python literal up to the comma or bracket that ends it, as JSON."""
    found: list[str] = []
    closers: list[str] = []
    quote = ""
    while True:
        character = yield from scanner.peek()
        if not character or len(found) > _MAX_VALUE or len(closers) > MAX_JSON_DEPTH:
            raise Malformed
        if not quote and not closers and character in ",)":
            return _as_json("".join(found))
        scanner.skip(1)
        found.append(character)
        if quote:
            if character == "\\":
                found.append((yield from scanner.peek()))
                scanner.skip(1 if found[-1] else 0)
            elif character == quote:
                quote = ""
        elif character in "\"'":
            quote = character
        elif character in "([{":
            closers.append({"(": ")", "[": "]", "{": "}"}[character])
        elif character in ")]}" and (not closers or closers.pop() != character):
            raise Malformed


def _as_json(text: str) -> str:
    """What was written as Python or, since models mix them up, as JSON, which stays as it is."""
    text = text.strip()
    try:
        json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return _python_as_json(text)
    return text


def _refuse(name: str) -> None:
    """NaN and Infinity, which are no JSON."""
    raise ValueError(name)


def _python_as_json(text: str) -> str:
    try:
        with warnings.catch_warnings():
            # "\\d" is a string to Python, with a warning.
            warnings.simplefilter("ignore")
            value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise Malformed from None
    if not _is_json(value):
        raise Malformed
    return json.dumps(value, ensure_ascii=False)


def _is_json(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, list | tuple):
        return all(map(_is_json, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(item) for key, item in value.items())
    return value is None or isinstance(value, str | bool | int)


def _call_format(tools: list[tuple[str, dict[str, Any]]], parallel: bool) -> dict[str, Any]:
    calls = [{"type": "tag", "begin": f"{name}(", "content": _keywords(schema), "end": ")"} for name, schema in tools]
    return sequence(const("["), tags(calls, ", ", parallel), const("]"))


def _keywords(schema: dict[str, Any]) -> Format:
    """Arguments in the order of the schema, their values as JSON, which is read as well as Python."""
    properties = schema.get("properties")
    named = properties if isinstance(properties, dict) else {}
    required = schema.get("required")
    names = [name for name in named if re.fullmatch(r"\w+", name)]
    must = [name for name in names if isinstance(required, list) and name in required]
    may = [name for name in names if name not in must][:_MAX_OPTIONAL]
    definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}

    def field(name: str) -> Format:
        inner = named[name]
        whole = {**inner, **definitions} if isinstance(inner, dict) else inner
        return sequence(const(f"{name}="), schema_of(whole))

    return optional_fields([field(name) for name in must], [field(name) for name in may], const(", "))


FAMILY = ToolFamily("pythonic", _run, (_OPEN, _CLOSE), _call_format, marked=False)

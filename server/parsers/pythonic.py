"""Tool calls of Llama 3.2 and 4 as Python: `[get_weather(city="Paris", days=3), now()]`, the whole output, or behind
text where the name is a declared tool's.

Strings stream as they come. Any other value goes out when it is complete: only then is it known what it is in JSON.
"""

from __future__ import annotations

import json
import re
import string
import sys
from typing import Any

from engine.text.schema_types import SchemaTypes, is_json, literal_as_json
from server.parsers.base import MAX_JSON_DEPTH, MAX_NAME, SPACE, Malformed, Scanner, Steps, ToolFamily
from server.parsers.call_objects import NAME_CHARACTERS
from server.parsers.formats import Format, const, optional_fields, schema_of, sequence, tags
from server.parsers.json_text import json_escaped

_OPEN, _CLOSE = "<|python_start|>", "<|python_end|>"
_NAME = re.compile(r"[\w.\-]")
_KEYWORD = re.compile(r"(\w+)\s*=(?!=)\s*")
_MAYBE_KEYWORD = re.compile(r"\w*\s*=?\s*")
_PLAIN = {quote: re.compile(rf"[^{quote}\\]+") for quote in "\"'"}
_ESCAPES = {"\n": "", "n": "\n", "t": "\t", "r": "\r", "a": "\a", "b": "\b", "f": "\f", "v": "\v", "0": "\0"}
_ESCAPES |= {character: character for character in "\\'\"/"}
_CODES = {"x": 2, "u": 4, "U": 8}
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
    while marker := (yield from scanner.until((_OPEN, "["), scanner.content)):
        if marker == _OPEN:
            yield from _read_list(scanner, marked=True)
            yield from scanner.accept(_CLOSE, spaced=True)
        elif (yield from is_python_call(scanner)):
            scanner.skip(-1)
            yield from _read_list(scanner)
        else:
            scanner.fail()


def is_python_call(scanner: Scanner) -> Steps[bool]:
    """Whether a declared name and a bracket come next."""
    _, begin = yield from scanner.look_past(SPACE)
    character, end = yield from scanner.look_past(NAME_CHARACTERS, begin)
    return character == "(" and scanner.is_declared(scanner.text[scanner.at + begin : scanner.at + end])


def _read_list(scanner: Scanner, *, marked: bool = False) -> Steps[None]:
    """The list of calls; it has been begun. marked: behind a mark its brackets may be missing."""
    try:
        yield from scanner.space()
        is_list = yield from scanner.accept("[")
        if not is_list and not (marked and (yield from is_python_call(scanner))):
            raise Malformed
        while True:
            yield from scanner.space()
            yield from read_python_call(scanner)
            if (yield from scanner.accept("]", spaced=True)) or not (is_list or (yield from _is_next(scanner))):
                return
            scanner.begin()
            # A comma may be missing, or one too many.
            if (yield from scanner.accept(",", spaced=True)) and (yield from scanner.accept("]", spaced=True)):
                scanner.settle()
                return
    except Malformed:
        scanner.fail()


def _is_next(scanner: Scanner) -> Steps[bool]:
    """Whether a comma comes next."""
    return (yield from scanner.look_past(SPACE))[0] == ","


def read_python_call(scanner: Scanner) -> Steps[None]:
    """A call; it has begun where the first of its values is one. What is wrong behind that goes on as it is."""
    name = yield from scanner.word(_NAME)
    yield from scanner.expect("(")
    if not scanner.is_declared(name) and scanner.is_declared(name.removesuffix(".call")):
        name = name.removesuffix(".call")
    is_known = scanner.is_declared(name)
    types = SchemaTypes(scanner.parameters(name))
    # What values without a keyword are called.
    places = iter(types.properties())
    before = "{"
    while (character := (yield from scanner.space())) != ")":
        if not character:
            if not (scanner.has_begun or is_known):
                raise Malformed
            break
        if scanner.has_begun:
            scanner.begin()
        keyword = yield from _read_keyword(scanner)
        if not keyword and scanner.closed and scanner.cut and _MAYBE_KEYWORD.fullmatch(scanner.text, scanner.at):
            if not (scanner.has_begun or is_known):
                raise Malformed
            # Half a keyword.
            scanner.skip(len(scanner.text) - scanner.at)
            character = ""
            break
        if not keyword and is_known and before == "{" and (found := (yield from _look_at_object(scanner, types))):
            # All arguments as one object.
            scanner.start_call(name)
            scanner.arguments(found)
            yield from scanner.accept(")", spaced=True)
            scanner.end_call()
            return
        keyword = keyword or next(places, "")
        if not keyword:
            source, _ = yield from _read_source(scanner)
            if not scanner.has_begun:
                if not is_known:
                    raise Malformed
                scanner.start_call(name)
            scanner.arguments(before + source)
        else:
            before += f"{json.dumps(keyword, ensure_ascii=False)}: "
            character = yield from scanner.space()
            if character and character in "\"'":
                if not scanner.has_begun:
                    scanner.start_call(name)
                scanner.arguments(before)
                yield from _read_text(scanner)
            else:
                source, is_whole = yield from _read_source(scanner)
                value = _as_json(source) if is_whole else source.strip()
                if value is None and not (scanner.has_begun or is_known):
                    raise Malformed
                if not scanner.has_begun:
                    scanner.start_call(name)
                scanner.arguments(before + (json.dumps(source.strip(), ensure_ascii=False) if value is None else value))
        before = ", "
        yield from scanner.accept(",", spaced=True)
    if not scanner.has_begun:
        scanner.start_call(name)
    scanner.skip(len(character))
    if character or not scanner.cut:
        scanner.arguments("{}" if before == "{" else "}")
    scanner.end_call()


def _look_at_object(scanner: Scanner, types: SchemaTypes) -> Steps[str]:
    """The only value of a call, where that is an object of all its arguments, as JSON, which is read; else ""."""
    unpacks = yield from scanner.look_at(("**{", "** {"))
    if unpacks is None and (yield from scanner.peek()) != "{":
        return ""
    ahead = scanner.ahead
    scanner.skip(len(unpacks) - 1 if unpacks else 0)
    source, is_whole = yield from _read_source(scanner)
    following, _ = yield from scanner.look_past(SPACE)
    value = _as_json(source) if is_whole and following == ")" else None
    keys = json.loads(value) if value is not None else None
    properties = types.properties()
    first = next(iter(properties.values()), None)
    takes_object = first is not None and "object" in types.types(first, implied=True)
    if isinstance(keys, dict) and (unpacks or keys.keys() <= properties.keys() or not takes_object):
        assert value is not None
        return value
    scanner.rewind(ahead)
    return ""


def _read_keyword(scanner: Scanner) -> Steps[str]:
    """The keyword of the next value; "" where there is none, and nothing is read."""
    while True:
        rest = scanner.text[scanner.at : scanner.at + 2 * MAX_NAME]
        found = _KEYWORD.match(rest)
        if found is not None and (found.end() < len(rest) or scanner.closed):
            scanner.skip(found.end())
            return found[1]
        if scanner.closed or len(rest) == 2 * MAX_NAME or not _MAYBE_KEYWORD.fullmatch(rest):
            return ""
        yield


def _read_text(scanner: Scanner) -> Steps[None]:
    """A string, which streams as JSON. A quote that nothing follows as it follows a value is a part of the text."""
    quote = yield from scanner.peek()
    if (yield from scanner.look_at((quote * 3,))) is not None:
        quote *= 3
    scanner.skip(len(quote))
    scanner.arguments('"')
    plain = _PLAIN[quote[0]]
    while character := (yield from scanner.peek()):
        found = plain.match(scanner.text, scanner.at)
        if found is not None:
            scanner.skip(len(found[0]))
            text = found[0]
        elif character == "\\":
            text = yield from _read_escape(scanner)
        elif (yield from scanner.look_at((quote,))) is None:
            scanner.skip(1)
            text = character
        else:
            following, distance = yield from scanner.look_past(SPACE, len(quote))
            if not following or following in ",)":
                scanner.skip(len(quote))
                break
            if following == quote and distance > len(quote):
                # Neighbouring strings are one to Python.
                scanner.skip(distance + len(quote))
                continue
            scanner.skip(len(quote))
            text = quote
        scanner.arguments(json_escaped(text))
    if character or not scanner.cut:
        scanner.arguments('"')


def _read_escape(scanner: Scanner) -> Steps[str]:
    """What a backslash and the characters behind it stand for; themselves, where it is nothing."""
    scanner.skip(1)
    character = yield from scanner.peek()
    scanner.skip(len(character))
    if character in _ESCAPES:
        return _ESCAPES[character]
    size = _CODES.get(character)
    if size is None:
        return "\\" + character
    digits = ""
    while len(digits) < size and (digit := (yield from scanner.peek())) and digit in string.hexdigits:
        scanner.skip(1)
        digits += digit
    if len(digits) < size or (code := int(digits, 16)) > sys.maxunicode:
        return f"\\{character}{digits}"
    return chr(code)


def _read_source(scanner: Scanner) -> Steps[tuple[str, bool]]:
    """The source of a value up to the comma or bracket that ends it, and whether one does."""
    found: list[str] = []
    closers: list[str] = []
    quote = ""
    while character := (yield from scanner.peek()):
        if len(found) > _MAX_VALUE or len(closers) > MAX_JSON_DEPTH:
            raise Malformed
        if not quote and not closers and character in ",)":
            return "".join(found), True
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
    return "".join(found), False


def _as_json(text: str) -> str | None:
    """What was written as Python or, since models mix them up, as JSON, which stays as it is. None for neither."""
    text = text.strip()
    return text if is_json(text) else literal_as_json(text)


def _call_format(tools: list[tuple[str, dict[str, Any]]], parallel: bool) -> dict[str, Any]:
    return sequence(const("["), tags([python_call(*tool) for tool in tools], ", ", parallel), const("]"))


def python_call(name: str, schema: dict[str, Any]) -> Format:
    """The tag of one call."""
    return {"type": "tag", "begin": f"{name}(", "content": _keywords(schema), "end": ")"}


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

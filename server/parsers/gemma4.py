"""Calls of Gemma 4 and FunctionGemma: `call:name{key:value,...}` between marks, strings between marks.

Values are numbers, words, lists and objects with bare keys. Text goes out as it comes; the rest as it is complete.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from engine.text.schema_types import SchemaTypes, is_json
from server.parsers.base import MAX_JSON_DEPTH, MAX_NAME, SPACE, Malformed, Scanner, Steps, ToolFamily
from server.parsers.call_objects import read_call_object
from server.parsers.formats import Format, const, either, optional_fields, schema_of, sequence, tags
from server.parsers.json_text import json_escaped, read_arguments
from server.parsers.tagged import drop_begun, without_begun

_NAME = re.compile(r"[\w.\-]")
_NUMBER = re.compile(r"[-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?")
# How calls begin where the mark is missing.
_UNMARKED = ("call:", "<call>")
_WORDS = {"true": "true", "false": "false", "null": "null", "none": "null", "nil": "null"}
# Parameters beyond these cannot be forced; a call stays valid without them.
_MAX_OPTIONAL = 16
_MAX_BARE = 1 << 16


@dataclass(frozen=True, slots=True)
class _Marks:
    begin: str
    end: str
    quote: str
    also: tuple[str, ...] = ()


class _CutOff(Exception):
    """The text has ended inside of the arguments, or what they are cannot be told any more."""


def _family(name: str, marks: _Marks) -> ToolFamily:
    def run(scanner: Scanner) -> Steps[None]:
        while marker := (yield from scanner.until((marks.begin, *marks.also, *_UNMARKED), scanner.content)):
            if marker in marks.also:
                # The begin of an answer to a call, where these models stop.
                scanner.settle()
                continue
            try:
                yield from _read_call(scanner, marks, marked=marker == marks.begin)
            except Malformed:
                scanner.fail()
                continue
            if not (yield from scanner.accept(marks.end, spaced=True)):
                drop_begun(scanner, (marks.end, marks.begin))

    def call_format(tools: list[tuple[str, dict[str, Any]]], parallel: bool) -> Format:
        calls: list[Format] = [
            {
                "type": "tag",
                "begin": f"{marks.begin}call:{name}{{",
                "content": _fields(schema, marks),
                "end": "}" + marks.end,
            }
            for name, schema in tools
        ]
        return tags(calls, "", parallel)

    return ToolFamily(name, run, (marks.begin, marks.end, marks.quote, *marks.also), call_format)


def _read_call(scanner: Scanner, marks: _Marks, *, marked: bool) -> Steps[None]:
    """marked: it stands behind its mark; without one, or without `call:`, it has to name a declared tool."""
    if marked:
        if (yield from scanner.space()) == "{":
            yield from read_call_object(scanner, (marks.end, marks.begin))
            return
        yield from scanner.accept(":")
        marked = yield from scanner.accept("call:")
        yield from scanner.space()
    name = yield from scanner.word(_NAME)
    if (yield from scanner.space()) != "{" or not (marked or scanner.is_declared(name)):
        raise Malformed
    scanner.start_call(name)
    types = SchemaTypes(scanner.parameters(name))
    reader = _Reader(scanner, marks, types)
    try:
        yield from reader.read_object(0)
    except _CutOff:
        # What follows up to the end of the call cannot be read; it goes out as it is.
        yield from scanner.before((marks.end,), scanner.arguments)
    scanner.end_call()


class _Reader:
    def __init__(self, scanner: Scanner, marks: _Marks, types: SchemaTypes) -> None:
        self._scanner = scanner
        self._marks = marks
        self._types = types

    def read_object(self, depth: int) -> Steps[None]:
        scanner = self._scanner
        scanner.skip(1)
        scanner.arguments("{")
        num_fields = 0
        while (character := (yield from scanner.space())) != "}":
            if not character and not scanner.cut:
                break
            if not character or character == "]":
                raise _CutOff
            if character == ",":
                scanner.skip(1)
                continue
            if (yield from self._is_end()):
                break
            key = yield from self._read_key()
            scanner.arguments((", " if num_fields else "") + json.dumps(key, ensure_ascii=False) + ": ")
            num_fields += 1
            yield from self._read_value(depth + 1, self._types.property(key) if depth == 0 else True)
        if character == "}":
            scanner.skip(1)
        scanner.arguments("}")

    def _is_end(self) -> Steps[bool]:
        """Whether the end of the call comes next, with its bracket missing."""
        return (yield from self._scanner.look_at((self._marks.end,))) is not None

    def _read_key(self) -> Steps[str]:
        scanner, found = self._scanner, ""
        quote = self._marks.quote if (yield from scanner.accept(self._marks.quote)) else ""
        while not (quote and (yield from scanner.accept(quote))):
            character = yield from scanner.peek()
            if character == ":" and not quote:
                break
            if not character or len(found) > MAX_NAME or (not quote and character in "{}[],"):
                if not scanner.cut:
                    scanner.arguments(found)
                raise _CutOff
            scanner.skip(1)
            found += character
        found = found.strip(SPACE + '"')
        if not (yield from scanner.accept(":", spaced=True)):
            raise _CutOff
        return found

    def _read_value(self, depth: int, schema: Any) -> Steps[None]:
        scanner = self._scanner
        character = yield from scanner.space()
        begun = yield from scanner.accept(self._marks.quote)
        drop_begun(scanner, (self._marks.quote,))
        if depth > MAX_JSON_DEPTH or (not begun and scanner.closed and scanner.cut and scanner.at == len(scanner.text)):
            raise _CutOff
        if begun:
            yield from self._read_text(self._marks.quote, schema)
        elif character == '"':
            # As JSON writes it.
            if not (yield from read_arguments(scanner, scanner.arguments, (self._marks.end,))):
                raise _CutOff
        elif character == "{":
            yield from self.read_object(depth)
        elif character == "[":
            yield from self._read_list(depth)
        else:
            yield from self._read_bare(schema)

    def _read_text(self, quote: str, schema: Any) -> Steps[None]:
        scanner = self._scanner
        if "string" not in self._types.types(schema, implied=True):
            # FunctionGemma has every value between these marks.
            pieces: list[str] = []
            ended = yield from scanner.until((quote,), pieces.append)
            if ended is None:
                scanner.arguments("".join(pieces))
                raise _CutOff
            scanner.arguments(self._types.read_value("".join(pieces), schema))
            return

        def send(text: str) -> None:
            if scanner.closed and scanner.cut:
                text = without_begun(text, (quote,))
            scanner.arguments(json_escaped(text))

        scanner.arguments('"')
        end = self._marks.end
        while (ended := (yield from scanner.until((quote, end), send))) == end:
            # Text, unless nothing but another call stands behind it: then the mark of the string is missing.
            following, distance = yield from scanner.look_past(SPACE)
            if not following or (yield from scanner.look_at((self._marks.begin,), distance)) is not None:
                scanner.skip(-len(end))
                break
            send(end)
        if ended is None and scanner.cut:
            raise _CutOff
        scanner.arguments('"')

    def _read_list(self, depth: int) -> Steps[None]:
        scanner = self._scanner
        scanner.skip(1)
        scanner.arguments("[")
        num_items = 0
        while (character := (yield from scanner.space())) != "]":
            if not character and not scanner.cut:
                break
            if not character or character == "}":
                raise _CutOff
            if character == ",":
                scanner.skip(1)
                continue
            if (yield from self._is_end()):
                break
            if num_items:
                scanner.arguments(", ")
            num_items += 1
            yield from self._read_value(depth + 1, True)
        if character == "]":
            scanner.skip(1)
        scanner.arguments("]")

    def _read_bare(self, schema: Any) -> Steps[None]:
        scanner, found = self._scanner, ""
        while (character := (yield from scanner.peek())) and character not in ",}]":
            if len(found) > _MAX_BARE or (character == "<" and (yield from self._is_end())):
                break
            scanner.skip(1)
            found += character
        text = found.strip(SPACE)
        if not character and scanner.cut:
            scanner.arguments(text)
            raise _CutOff
        scanner.arguments(self._as_json(text, schema))

    def _as_json(self, text: str, schema: Any) -> str:
        admitted = self._types.types(schema, implied=True)
        if admitted == frozenset({"string"}):
            return json.dumps(text, ensure_ascii=False)
        if text.lower() in _WORDS and ("string" not in admitted or text in _WORDS or text == "None"):
            return _WORDS[text.lower()]
        if is_json(text):
            return text
        if _NUMBER.fullmatch(text):
            return self._types.read_value(text, schema)
        return json.dumps(text, ensure_ascii=False)


def _fields(schema: dict[str, Any], marks: _Marks) -> Format:
    """Arguments in the order of the schema: text between its marks; what holds none is written as JSON writes it."""
    types = SchemaTypes(schema)
    definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    required = schema.get("required")
    named = {key: inner for key, inner in types.properties().items() if re.fullmatch(r"[\w\-]+", key)}
    must = [key for key in named if isinstance(required, list) and key in required]
    may = [key for key in named if key not in must][:_MAX_OPTIONAL]

    def field(key: str) -> Format:
        inner = named[key]
        values = types.values(inner)
        if values is not None:
            texts = [value for value in values if isinstance(value, str) and marks.quote not in value]
            if texts:
                return sequence(const(f"{key}:{marks.quote}"), either(*map(const, texts)), const(marks.quote))
        if "string" in types.types(inner, implied=True):
            return sequence(const(f"{key}:{marks.quote}"), {"type": "any_text"}, const(marks.quote))
        whole = {**inner, **definitions} if isinstance(inner, dict) else inner
        return sequence(const(f"{key}:"), schema_of(whole))

    return optional_fields([field(key) for key in must], [field(key) for key in may], const(","))


GEMMA4 = _family("gemma4", _Marks("<|tool_call>", "<tool_call|>", '<|"|>', also=("<|tool_response>",)))
FUNCTIONGEMMA = _family(
    "functiongemma",
    _Marks("<start_function_call>", "<end_function_call>", "<escape>", also=("<start_function_response>",)),
)

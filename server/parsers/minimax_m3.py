"""Calls of MiniMax M3: tags named after the parameters, each behind a mark, and tags in tags for lists and objects.

A list's elements stand in tags named item. Text goes out as it comes.
"""

from __future__ import annotations

import json
import re
from typing import Any

from engine.text.schema_types import SchemaTypes
from server.parsers.base import MAX_JSON_DEPTH, MAX_NAME, SPACE, Malformed, Scanner, Steps, ToolFamily
from server.parsers.formats import Format, const, either, schema_of, sequence, tags
from server.parsers.tagged import Value, drop_begun

_NS = "]<]minimax[>["
_OPEN, _CLOSE = f"{_NS}<tool_call>", f"{_NS}</tool_call>"
_CALL, _CALL_END = f"{_NS}<invoke name=", f"{_NS}</invoke>"
_TAG, _TAG_END = f"{_NS}<", f"{_NS}</"
_ENDS = (_CALL_END, _CLOSE, _CALL, _OPEN)
_NAME = re.compile(r"[^<>\s]")


def _run(scanner: Scanner) -> Steps[None]:
    inside = False
    while marker := (yield from scanner.until((_OPEN, _CALL) if inside else (_OPEN,), scanner.content)):
        try:
            if marker == _OPEN:
                yield from scanner.space()
                yield from scanner.expect(_CALL)
            yield from _read_call(scanner)
        except Malformed:
            scanner.fail()
            continue
        inside = not (yield from scanner.accept(_CLOSE, spaced=True))
        drop_begun(scanner, (_CLOSE, _CALL, _CALL_END))


def _read_call(scanner: Scanner) -> Steps[None]:
    header, _ = yield from scanner.raw_until((">",), MAX_NAME)
    name = header.strip().strip("\"'")
    if not name or re.search(r"\s", name):
        raise Malformed
    scanner.start_call(name)
    parameters = scanner.parameters(name)
    reader = _Reader(scanner, SchemaTypes(parameters))
    try:
        yield from reader.read_fields(parameters, 0)
    except _CutOff:
        pass
    else:
        yield from scanner.accept(_CALL_END, spaced=True)
    scanner.end_call()


class _CutOff(Exception):
    """A limit has ended the text inside of the call."""


class _Reader:
    def __init__(self, scanner: Scanner, types: SchemaTypes) -> None:
        self._scanner = scanner
        self._types = types

    def read_fields(self, schema: Any, depth: int) -> Steps[None]:
        """Tags up to one that ends what they are in, which is not read."""
        scanner = self._scanner
        is_list = False
        num_fields = 0
        while (name := (yield from self._read_name())) is not None:
            if not num_fields:
                is_list = depth > 0 and name == "item" and self._may_be_list(schema)
                scanner.arguments("[" if is_list else "{")
            scanner.arguments(", " if num_fields else "")
            if not is_list:
                scanner.arguments(json.dumps(name, ensure_ascii=False) + ": ")
            num_fields += 1
            inner = self._types.items_of(schema) if is_list else self._types.property_of(schema, name)
            yield from self._read_value(name, inner, depth + 1)
        scanner.arguments(("]" if is_list else "}") if num_fields else "{}")

    def _may_be_list(self, schema: Any) -> bool:
        admitted = self._types.types(schema, implied=True)
        return "array" in admitted or "object" not in admitted

    def _check_cut(self) -> None:
        drop_begun(self._scanner, (*_ENDS, _TAG, _TAG_END))
        if self._scanner.closed and self._scanner.cut and self._scanner.at == len(self._scanner.text):
            raise _CutOff

    def _read_name(self) -> Steps[str | None]:
        """The name in the next opening tag; None where no such tag follows. What stands before it is left out."""
        scanner = self._scanner
        dropped: list[str] = []
        marker = yield from scanner.before((_NS,), dropped.append)
        following = yield from scanner.look_at((*_ENDS, _TAG_END))
        self._check_cut()
        if marker is None or following is not None or not (yield from scanner.accept(_TAG)):
            return None
        scanner.begin()
        try:
            name = yield from scanner.word(_NAME)
            yield from scanner.accept(">", spaced=True)
        except Malformed:
            name = ""
        if not name or scanner.text[scanner.at - 1] != ">":
            self._check_cut()
            return None
        return name

    def _read_value(self, name: str, schema: Any, depth: int) -> Steps[None]:
        """What stands in a tag, and its end."""
        scanner = self._scanner
        _, distance = yield from scanner.look_past(SPACE)
        # The longest: an end is no begin.
        following = yield from scanner.look_at((_TAG, _TAG_END, *_ENDS), distance)
        if following == _TAG and depth < MAX_JSON_DEPTH:
            yield from self.read_fields(schema, depth)
        else:
            value = Value(scanner, self._types, schema, {}, (_NS,))
            marker = yield from scanner.until((_NS,), value.add)
            if marker is None and scanner.cut:
                value.cut()
                raise _CutOff
            if marker is not None:
                scanner.skip(-len(_NS))
            value.end(whole=marker is not None)
        if not (yield from scanner.accept(f"{_TAG_END}{name}>", spaced=True)):
            drop_begun(scanner, (f"{_TAG_END}{name}>",))


def _call_format(tools: list[tuple[str, dict[str, Any]]], parallel: bool) -> Format:
    calls: list[Format] = [
        {"type": "tag", "begin": f'{_CALL}"{name}">', "content": _fields(schema, schema, 0), "end": _CALL_END}
        for name, schema in tools
    ]
    return sequence(const(_OPEN + "\n"), tags(calls, "\n", parallel), const("\n" + _CLOSE))


def _fields(schema: Any, root: dict[str, Any], depth: int) -> Format:
    """The parameters in the order of the schema; lists and objects among them as JSON, which is read as well."""
    types = SchemaTypes(root)
    required = schema.get("required")
    definitions = {key: root[key] for key in ("$defs", "definitions") if key in root}
    parts: list[Format] = []
    for key, inner in types.properties().items():
        if not re.fullmatch(r"[^<>\s/]+", key):
            continue
        values = types.values(inner)
        texts = [value for value in values or () if isinstance(value, str) and value and "<" not in value]
        value: Format
        if texts:
            value = either(*map(const, texts))
        elif "string" in types.types(inner, implied=True):
            value = {"type": "any_text"}
        else:
            value = schema_of({**inner, **definitions} if isinstance(inner, dict) else inner)
        part = sequence(const(f"{_TAG}{key}>"), value, const(f"{_TAG_END}{key}>"))
        must = isinstance(required, list) and key in required
        parts.append(part if must else either(const(""), part))
    return sequence(*parts) if parts else const("")


FAMILY = ToolFamily("minimax_m3", _run, (_NS,), _call_format)

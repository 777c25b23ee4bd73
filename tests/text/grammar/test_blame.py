"""A schema that cannot be used: its keyword and place, and why, in no words of the library."""

from __future__ import annotations

import re
from typing import Any

import pytest

from engine.request import RequestError
from tests.text.grammars import compiler, spec

# Each with what the sentence says: the keyword, its place, and no word of the library.
FAULTS: list[tuple[Any, str]] = [
    (
        {"type": "object", "properties": {"a": {"type": "integer", "minimum": 5, "maximum": 4}}, "required": ["a"]},
        "at `properties.a.m",
    ),
    ({"type": "object", "allOf": [{"properties": {"x": {"not": {}}}, "required": ["x"]}]}, "at `allOf[0]."),
    (
        {"type": "object", "properties": {"n": {"type": "number", "multipleOf": 1.23456789e-19}}},
        "properties.n.multipleOf",
    ),
    ({"properties": {"a": {"pattern": "a^b"}, "b": {"pattern": "c^d"}}, "type": "object"}, "`pattern` at `properties."),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"type": "string", "pattern": "x^"}}}, "`pattern` at `$defs.a.pattern`"),
    ({"properties": {"a": {"minimum": "x"}}}, "`minimum` that is no number (at `properties.a`)"),
    ({"properties": {"k" * 500: {"minimum": "x"}}}, f"no number (at `properties.{'k' * 53}...`)"),
    ({"properties": {"a": {"items": [{"uniqueItems": "yes"}]}}}, "`uniqueItems`"),
    ({"properties": {"a": 3}}, "`properties` with no schema for 'a'"),
    ({"items": {"properties": []}}, "`properties` that is no object (at `items`)"),
]


@pytest.mark.parametrize("schema, words", FAULTS)
def test_a_fault_is_named_in_the_words_of_the_schema(schema: Any, words: str) -> None:
    with pytest.raises(RequestError) as error:
        compiler().compile(spec("json_schema", schema))
    message = str(error.value)
    assert words in message
    assert not re.search(r"(?i)regex|lexer|disjoint|json-schema:///|lark|unsatisfiable|llguidance|fuel", message)

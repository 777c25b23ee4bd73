"""Types of schemas, and bare text as JSON by them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.text.schema_types import ALL, SchemaTypes
from tests.work import counted

NUMBER = {"number", "integer"}
ROOT: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "string"}, "self": {"$ref": "#"}},
    "$defs": {
        "text": {"type": "string"},
        "color": {"enum": ["red", "5"]},
        "a/b~c d": {"type": "integer"},
        "loop": {"$ref": "#/$defs/loop"},
        "tree": {"anyOf": [{"type": "array"}, {"$ref": "#/$defs/tree"}]},
        "list": [{"type": "boolean"}],
        "maybe": {"anyOf": [{"$ref": "#/$defs/text"}, {"type": "null"}]},
    },
    "definitions": {"old": {"type": "array"}},
}
STRING, INTEGER, NULL, OBJECT = ({"type": name} for name in ("string", "integer", "null", "object"))


def ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/$defs/{name}"}


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (STRING, {"string"}),
        (INTEGER, {"integer"}),
        ({"type": "number"}, NUMBER),
        ({"type": ["string", "null"]}, {"string", "null"}),
        ({"type": "STRING"}, {"string"}),
        ({"type": "int"}, {"integer"}),
        ({"type": "float"}, NUMBER),
        ({"type": "dict"}, {"object"}),
        ({"type": "any"}, ALL),
        ({"type": 3}, ALL),
        ({"type": []}, ALL),
        ({"type": [3]}, ALL),
        ({}, ALL),
        (True, ALL),
        (False, set()),
        (None, ALL),
        (3, ALL),
        ([], ALL),
        ({"anyOf": [STRING, NULL]}, {"string", "null"}),
        ({"oneOf": [STRING, {"type": "array"}]}, {"string", "array"}),
        ({"allOf": [STRING]}, {"string"}),
        ({"allOf": [{"type": ["string", "integer"]}, {"type": ["integer", "null"]}]}, {"integer"}),
        ({"allOf": [{"type": "number"}, INTEGER]}, {"integer"}),
        ({"allOf": [{"description": "x"}, STRING]}, {"string"}),
        ({"type": ["string", "null"], "anyOf": [STRING, INTEGER]}, {"string"}),
        ({"anyOf": []}, ALL),
        ({"anyOf": 3, "allOf": "x", "oneOf": {}}, ALL),
        ({"anyOf": [STRING, {}]}, {"string"} | ALL),
        ({"anyOf": [STRING, True]}, ALL),
        ({"enum": ["a", 1, None, 1.5, True, [], {}]}, ALL),
        ({"enum": [1, 2.0]}, {"integer"}),
        ({"enum": []}, ALL),
        ({"const": "x"}, {"string"}),
        ({"const": None}, {"null"}),
        ({"const": False}, {"boolean"}),
        ({"type": "string", "enum": ["a", None]}, {"string"}),
        ({"type": "string", "nullable": True}, {"string", "null"}),
        ({"type": "integer", "nullable": False}, {"integer"}),
        (ref("text"), {"string"}),
        (ref("color"), {"string"}),
        (ref("maybe"), {"string", "null"}),
        (ref("a~1b~0c%20d"), {"integer"}),
        (ref("list/0"), {"boolean"}),
        (ref("list/7"), ALL),
        (ref("list/x"), ALL),
        (ref("missing"), ALL),
        ({"$ref": "#/definitions/old"}, {"array"}),
        ({"$ref": "#"}, {"object"}),
        ({"$ref": "other.json#/x"}, ALL),
        ({"$ref": 3}, ALL),
        (ref("loop"), ALL),
        (ref("tree"), {"array"}),
        ({"anyOf": [ref("color"), NULL]}, {"string", "null"}),
        ({"$ref": "#/$defs/text", "nullable": True}, {"string", "null"}),
        ({"properties": {}}, ALL),
    ],
)
def test_types(schema: Any, expected: set[str]) -> None:
    assert SchemaTypes(ROOT).types(schema) == expected


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"properties": {}}, {"object"}),
        ({"items": {}}, {"array"}),
        ({"pattern": "x"}, {"string"}),
        ({"minimum": 1}, NUMBER),
        ({"anyOf": [{"properties": {}}, NULL]}, {"object", "null"}),
        ({"type": "string", "minimum": 3}, {"string"}),
        ({"description": "x"}, ALL),
    ],
)
def test_types_that_keywords_imply(schema: Any, expected: set[str]) -> None:
    assert SchemaTypes(ROOT).types(schema, implied=True) == expected


OPTIONAL = {"anyOf": [STRING, NULL]}
ANYTHING: Any = {}
# schema, text, what it is
VALUES: list[tuple[Any, str, Any]] = [
    *((STRING, text, text) for text in ("5", "true", "null", "None", '{"a": 1}', '"q"', " x ", "", "1e5")),
    *((OPTIONAL, text, text) for text in ("12345", "true", "2024", '{"a": 1}', "[1]", '"q"', "nullable", "", " x")),
    *((schema, "null", None) for schema in (OPTIONAL, {"type": ["string", "null"]}, {**STRING, "nullable": True})),
    (OPTIONAL, "None", None),
    (OPTIONAL, " null ", None),
    (OPTIONAL, "NULL", "NULL"),
    ({"allOf": [STRING]}, "94105", "94105"),
    ({"type": ["string", "null"]}, "94105", "94105"),
    ({"oneOf": [STRING, {"type": "array"}]}, "12345", "12345"),
    ({"oneOf": [STRING, {"type": "array"}]}, "[1, 2]", [1, 2]),
    ({"oneOf": [STRING, {"type": "array"}]}, "[1, 2", "[1, 2"),
    ({"oneOf": [STRING, {"type": "array"}]}, '{"a": 1}', '{"a": 1}'),
    ({"anyOf": [STRING, OBJECT]}, '{"a": 1}', {"a": 1}),
    ({"anyOf": [STRING, OBJECT]}, "{'a': True}", {"a": True}),
    ({"anyOf": [STRING, OBJECT]}, "{a}", "{a}"),
    ({"anyOf": [STRING, INTEGER]}, "5", 5),
    ({"anyOf": [STRING, INTEGER]}, "5.5", "5.5"),
    ({"anyOf": [STRING, INTEGER]}, "007", "007"),
    ({"anyOf": [STRING, INTEGER]}, "9" * 300, "9" * 300),
    ({"anyOf": [STRING, {"type": "number"}]}, "5.5", 5.5),
    ({"anyOf": [STRING, {"type": "boolean"}]}, "true", True),
    ({"anyOf": [STRING, {"type": "boolean"}]}, "True", True),
    ({"anyOf": [STRING, {"type": "boolean"}]}, "1", "1"),
    (ref("color"), "5", "5"),
    (ref("maybe"), "5", "5"),
    ({"const": "5"}, "5", "5"),
    ({"enum": [1, 2]}, "2", 2),
    ({"enum": ["1", "2"]}, "2", "2"),
    ({"enum": ["auto", 1]}, "1", 1),
    ({"enum": ["auto", 1]}, "2", "2"),
    ({"enum": ["auto", 1]}, "auto", "auto"),
    ({"enum": [None, "a"]}, "null", None),
    ({"enum": [True, "yes"]}, "true", True),
    ({"enum": [1, "x"]}, "true", "true"),
    ({"anyOf": [{"enum": [1, 2]}, STRING]}, "5", "5"),
    ({"type": "string", "enum": [1, 2]}, "1", "1"),
    (INTEGER, "5", 5),
    (INTEGER, " 5\n", 5),
    (INTEGER, "5.0", 5),
    (INTEGER, "+5", 5),
    (INTEGER, "007", 7),
    (INTEGER, '"5"', 5),
    (INTEGER, "five", "five"),
    (INTEGER, "5.5", "5.5"),
    (INTEGER, "true", "true"),
    ({"type": "number"}, "5.0", 5.0),
    ({"type": "number"}, ".5", 0.5),
    ({"type": "number"}, "1e3", 1000.0),
    ({"type": "number"}, "NaN", "NaN"),
    ({"type": "number"}, "Infinity", "Infinity"),
    ({"type": "boolean"}, "true", True),
    ({"type": "boolean"}, "True", True),
    ({"type": "boolean"}, "FALSE", False),
    ({"type": "boolean"}, "yes", "yes"),
    ({"type": ["boolean", "null"]}, "None", None),
    (NULL, "null", None),
    (OBJECT, '{"a": {"b": [1]}}', {"a": {"b": [1]}}),
    (OBJECT, "{'a': True, 'b': None}", {"a": True, "b": None}),
    (OBJECT, '"{\\"a\\": 1}"', {"a": 1}),
    (OBJECT, "[1]", [1]),
    (OBJECT, "words", "words"),
    (OBJECT, '{"a": ', '{"a": '),
    (OBJECT, "{'a': '\\ud800'}", {"a": "\ud800"}),
    ({"type": "array"}, "[1, 2]", [1, 2]),
    ({"type": "array"}, "(1, 2)", [1, 2]),
    ({"properties": {"x": INTEGER}}, "{'x': 1}", {"x": 1}),
    ({"anyOf": [{"type": "array"}, NULL]}, "null", None),
    (ANYTHING, "5", 5),
    (ANYTHING, "True", True),
    (ANYTHING, "null", None),
    (ANYTHING, '"q"', "q"),
    (ANYTHING, "words", "words"),
    (ANYTHING, '{"a": 1}', {"a": 1}),
    (True, "5", 5),
    (None, "5", 5),
    (False, "5", "5"),
    (ref("loop"), "5", 5),
    (ref("tree"), "[1]", [1]),
]


@pytest.mark.parametrize(("schema", "text", "expected"), VALUES)
def test_bare_text_as_a_value(schema: Any, text: str, expected: Any) -> None:
    types = SchemaTypes(ROOT)
    read = types.read_value(text, schema)
    read.encode()
    value = json.loads(read)
    assert (type(value), value) == (type(expected), expected)


@given(st.sampled_from(VALUES), st.text("nulltrueNoTF12.5-e {}[]\"'x"), st.integers(0, 20))
def test_what_is_decided_stays_decided(case: tuple[Any, str, Any], more: str, size: int) -> None:
    schema, text, _ = case
    whole = text + more
    types = SchemaTypes(ROOT)
    if not types.is_undecided(whole[:size], schema):
        assert json.loads(types.read_value(whole, schema)) == whole


def test_undecided() -> None:
    types = SchemaTypes(ROOT)
    assert not types.is_undecided("", STRING)
    for begun in ("", "\n ", "n", "nul", "None", "null"):
        assert types.is_undecided(begun, OPTIONAL)
    for begun in ("nulls", "5", "{", "[", "t", "x", '"'):
        assert not types.is_undecided(begun, OPTIONAL)
    assert types.is_undecided("-1.5", {"type": ["string", "number"]})
    assert not types.is_undecided("-1.5x", {"type": ["string", "number"]})
    assert types.is_undecided("five", INTEGER)


def test_properties_of_the_root() -> None:
    root = {
        "allOf": [{"$ref": "#/$defs/base"}, {"properties": {"b": INTEGER}}],
        "properties": {"a": STRING},
        "$defs": {"base": {"properties": {"c": NULL, "a": NULL}}},
    }
    types = SchemaTypes(root)
    assert types.properties() == {"a": STRING, "b": INTEGER, "c": NULL}
    assert [types.property(name) for name in "abc"] == [STRING, INTEGER, NULL]
    assert types.property("d") is True
    assert SchemaTypes({"additionalProperties": STRING}).property("x") == STRING
    assert SchemaTypes({"anyOf": [{"properties": {"x": STRING}}]}).property("x") == STRING
    odds: list[Any] = [None, [], 3, {"properties": []}]
    for odd in odds:
        assert SchemaTypes(odd).property("x") is True and SchemaTypes(odd).properties() == {}


def test_listed_values() -> None:
    types = SchemaTypes(ROOT)
    assert types.values(ref("color")) == ["red", "5"]
    assert types.values({"anyOf": [ref("color"), {"const": 3}]}) == ["red", "5", 3]
    assert types.values({"anyOf": [ref("color"), STRING]}) is None
    assert types.values({"enum": [1], "nullable": True}) == [1, None]
    assert types.values({}) is None and types.values(ref("loop")) is None


def test_hostile_schemas_are_bounded() -> None:
    many: dict[str, Any] = {f"d{i}": {"anyOf": [ref(f"d{i + 1}")] * 3} for i in range(40)}
    many |= {"d40": STRING, "me": {"allOf": [{"$ref": "#/$defs/me"}, {"anyOf": [{"$ref": "#/$defs/me"}] * 9}]}}
    deep: Any = STRING
    for _ in range(5000):
        deep = {"allOf": [deep]}
    with counted() as work:
        for schema in (ref("d0"), ref("me"), deep, {"anyOf": [deep] * 1000}, {"enum": list(range(100_000))}):
            types = SchemaTypes({"$defs": many})
            types.types(schema)
            types.values(schema)
            types.admits(schema, "x")
            assert isinstance(types.read_value("5", schema), str)
            types.is_undecided("5", schema)
        for text in ("[" * 5000, "{" * 200_000, "9" * 10_000, '"' * 9, "[" + "9" * 5000 + "]", "('" * 300):
            assert json.loads(SchemaTypes({}).read_value(text, {"type": "array"})) in (text, [])
            assert json.loads(SchemaTypes({}).read_value(text, {})) == text
    assert work.num_calls < 10_000_000

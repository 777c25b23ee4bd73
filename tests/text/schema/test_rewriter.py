"""Random schemas of the keywords that are rewritten: what strict takes is never answered wrongly, nor takes long."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest

from engine.request import RequestError
from tests.text.grammars import admits, compiler, spec, walk
from tests.work import counted

NUM_BATCHES, PER_BATCH = 8, 40
# One of them takes 100,000 at most.
MAX_CALLS = 2_000_000


def made(rng: random.Random, depth: int) -> Any:
    """A schema that may say anything, sense or nonsense."""
    if depth == 0:
        kinds = ["string", "integer", "number", "boolean", "null", "object", "array"]
        plain = [True, False, {"type": rng.choice(kinds)}, {"const": rng.choice([1, "a", None, {"a": 1}])}]
        return rng.choice([*plain, {"enum": ["a", "b", 1]}])

    def inner() -> Any:
        return made(rng, depth - 1)

    def name() -> str:
        return rng.choice("abc")

    keywords: dict[str, Callable[[], Any]] = {
        "type": lambda: rng.choice(["string", "object", "array", ["integer", "null"], "number"]),
        "enum": lambda: ["a", 1, None, {}, []],
        "not": inner,
        "oneOf": lambda: [inner() for _ in range(rng.randint(1, 3))],
        "anyOf": lambda: [inner(), inner()],
        "allOf": lambda: [inner(), inner()],
        "if": inner,
        "then": inner,
        "else": inner,
        "properties": lambda: {name(): inner(), name(): inner()},
        "patternProperties": lambda: {rng.choice(["^a", "b$", "^[ab]$", "^(a|c)$"]): inner()},
        "additionalProperties": inner,
        "unevaluatedProperties": lambda: rng.choice([True, False, {"type": "string"}]),
        "propertyNames": lambda: rng.choice(
            [{"pattern": "^a"}, {"enum": ["a", "b"]}, {"maxLength": 2}, {"pattern": "^[abc]$"}]
        ),
        "required": lambda: [name()],
        "dependentRequired": lambda: {name(): [name()]},
        "dependentSchemas": lambda: {name(): inner()},
        "minProperties": lambda: rng.randint(0, 2),
        "maxProperties": lambda: rng.randint(0, 3),
        "items": inner,
        "prefixItems": lambda: [inner()],
        "contains": inner,
        "uniqueItems": lambda: rng.random() < 0.5,
        "minItems": lambda: rng.randint(0, 2),
        "maxItems": lambda: rng.randint(0, 3),
        "minimum": lambda: rng.randint(0, 4),
        "maximum": lambda: rng.randint(2, 6),
        "minLength": lambda: rng.randint(0, 3),
        "pattern": lambda: rng.choice(["^a", "^ab$", "b"]),
        "$ref": lambda: "#/$defs/d",
    }
    return {key: keywords[key]() for key in rng.sample(list(keywords), rng.randint(1, 4))}


@pytest.mark.parametrize("batch", range(NUM_BATCHES))
def test_random_schemas(batch: int) -> None:
    num_taken = 0
    for number in range(batch * PER_BATCH, (batch + 1) * PER_BATCH):
        rng = random.Random(number)
        schema = {"$defs": {"d": made(rng, 1)}, "allOf": [made(rng, rng.randint(1, 2))]}
        checker = jsonschema.Draft202012Validator(schema)
        for strict in (False, True):
            # Counting takes as long again.
            with counted() if number % 4 == 0 else contextlib.nullcontext() as work:
                try:
                    grammar = compiler().compile(spec("json_schema", schema, strict=strict))
                except RequestError:
                    grammar = None
            assert work is None or work.num_calls < MAX_CALLS, schema
        if grammar is None:
            continue
        num_taken += 1
        for seed in range(2):
            value = json.loads(walk(grammar, random.Random(seed))[0])
            assert checker.is_valid(value), (schema, value)
    assert num_taken > PER_BATCH / 3


REWRITTEN: list[tuple[Any, list[Any], list[Any]]] = [
    (True, [1, "a", {}], []),
    ({"not": {"type": "string"}}, [1, None, {}, [], True], ["a"]),
    ({"not": {"type": ["object", "array"]}}, [1, "a"], [{}, []]),
    ({"type": "string", "not": {"enum": ["ab", "ac", ""]}}, ["a", "abc", "b", "é"], ["ab", "ac", ""]),
    ({"type": "integer", "not": {"const": 3}}, [2, 4, -9], [3]),
    ({"not": {"required": ["a", "b"]}, "type": "object"}, [{}, {"a": 1}, {"b": 1}], [{"a": 1, "b": 2}]),
    ({"type": "object", "not": {"anyOf": [{"required": ["a"]}, {"required": ["b"]}]}}, [{}, {"c": 1}], [{"a": 1}]),
    (
        {"type": "object", "required": ["k"], "not": {"properties": {"k": {"const": "x"}}}},
        [{"k": "y"}, {"k": 1}],
        [{"k": "x"}],
    ),
    ({"not": {"not": {"type": "string"}}}, ["a"], [1]),
    ({"oneOf": [{"required": ["a"]}, {"required": ["b"]}], "type": "object"}, [{"a": 1}], [{"a": 1, "b": 1}, {}]),
    ({"oneOf": [{"type": "integer", "maximum": 3}, {"minimum": 2, "type": "integer"}]}, [1, 4], [2, 3]),
    ({"type": "object", "dependentRequired": {"a": ["b"]}}, [{}, {"a": 1, "b": 1}, {"b": 1}], [{"a": 1}]),
    ({"type": "object", "dependencies": {"a": ["b"]}}, [{}, {"a": 1, "b": 1}], []),
    (
        {"type": "object", "dependentSchemas": {"a": {"properties": {"b": {"type": "string"}}}}},
        [{"b": 1}, {"a": 1, "b": "x"}],
        [{"a": 1, "b": 1}],
    ),
    (
        {
            "type": "object",
            "properties": {"k": {"enum": ["s", "i"]}, "v": {}},
            "required": ["k", "v"],
            "if": {"properties": {"k": {"const": "s"}}},
            "then": {"properties": {"v": {"type": "string"}}},
            "else": {"properties": {"v": {"type": "integer"}}},
        },
        [{"k": "s", "v": "x"}, {"k": "i", "v": 1}],
        [{"k": "s", "v": 1}, {"k": "i", "v": "x"}],
    ),
    ({"type": "array", "contains": {"const": 1}}, [[1], [2, 1], [2, 3, 1, 4]], [[], [2]]),
    ({"type": "array", "contains": {"type": "string"}, "maxContains": 1}, [["a"], [1, "a", 2]], [[1], ["a", "b"]]),
    ({"type": "array", "contains": {"const": 1}, "minContains": 2}, [[1, 1], [1, 2, 1]], [[1]]),
    ({"type": "array", "contains": {"const": 1}, "minContains": 9}, [[1] * 9, [1, 2, *[1] * 8]], [[1] * 8]),
    (
        {"type": "array", "contains": {"type": "string"}, "minContains": 20, "maxContains": 22},
        [["a"] * 20, [*["a"] * 21, 1]],
        [["a"] * 19, ["a"] * 23],
    ),
    ({"type": "array", "contains": {"const": 1}, "minContains": 64, "maxItems": 64}, [[1] * 64], [[1] * 63]),
    ({"type": "integer", "not": {"multipleOf": 3}}, [1, -5, 100], [3, 0]),
    ({"type": "integer", "minimum": 10, "maximum": 20, "not": {"multipleOf": 2}}, [11, 19], [12, 20]),
    *(
        ({"type": "number", "exclusiveMinimum": low, most: low + 0.5, **more}, [low + 0.25], [low, low + 0.75])
        for low in (0, 1, 1000)
        for most, more in (("maximum", {}), ("exclusiveMaximum", {}), ("maximum", {"multipleOf": 0.25}))
    ),
    ({"type": "number", "exclusiveMaximum": -1, "minimum": -1.5}, [-1.25], [-1, -2]),
    ({"type": "number", "exclusiveMinimum": 0, "allOf": [{"maximum": 0.5}]}, [0.25], [0, 1]),
    ({"type": "number", "not": {"enum": [0, 0.5]}}, [0.25, 1, -1], [0, 0.5]),
    ({"type": "number", "maximum": 0.5, "not": {"maximum": 0}}, [0.25], [0, 1]),
    (
        {
            "type": "object",
            "properties": {"const": {"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}},
            "required": ["const"],
        },
        [{"const": 0.5}],
        [{"const": 0}],
    ),
    ({"type": "number", "not": {"multipleOf": 0.5}}, [0.25, -0.75], [1, 0.5]),
    ({"oneOf": [{"type": "integer", "multipleOf": of} for of in (3, 5)]}, [3, 5, -9], [15, 0, 1]),
    ({"type": "array", "minContains": 3}, [[]], []),
    (
        {"type": "array", "items": {"enum": ["a", "b", "c"]}, "uniqueItems": True},
        [[], ["b"], ["c", "a"], ["b", "c", "a"]],
        [["a", "a"], ["a", "b", "a"]],
    ),
    ({"type": "array", "items": {"type": "boolean"}, "uniqueItems": True}, [[True, False]], [[True, True]]),
    # What is not listed: short arrays of what begins otherwise.
    ({"type": "array", "items": {"type": "string"}, "uniqueItems": True},
     [[], ["b"], ["./x", "a b", "z"]], [["a", "a"], ["a", "z", "a"]]),
    ({"type": "array", "items": {"type": "number"}, "uniqueItems": True}, [[1, 2.5, -3]], [[1, 1], [2, 2.0]]),
    ({"type": "array", "uniqueItems": True}, [["a", 1], [None, {}], [[]], [True, False]], [["a", "a"], [{}, {}]]),
    ({"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 3}, "uniqueItems": True, "minItems": 3},
     [[2, 1, 3]], [[1, 1, 2], [1]]),
    ({"type": "array", "items": {"oneOf": [{"enum": ["a", "b"]}, {"type": "null"}]}, "uniqueItems": True},
     [["a", None, "b"]], [["a", "a"], [None, None]]),
    ({"type": "object", "propertyNames": {"enum": ["a", "b", "c"]}, "minProperties": 2, "properties": {"c": False}},
     [{"a": 1, "b": 2}], [{"a": 1}, {}, {"a": 1, "c": 1}]),
    ({"type": "array", "uniqueItems": True, "maxItems": 1}, [[1], []], [[1, 2]]),
    ({"type": "array", "uniqueItems": False}, [[1, 1]], []),
    ({"type": "object", "propertyNames": {"type": "string"}}, [{"a": 1}], []),
    ({"type": "object", "propertyNames": {"enum": ["a", "b"]}}, [{"a": 1}, {}], [{"c": 1}]),
    ({"type": "object", "propertyNames": {"pattern": "^a"}, "additionalProperties": {"type": "integer"}},
     [{"ab": 1}, {}], [{"b": 1}, {"a": "x"}]),
    ({"type": "object", "propertyNames": {"maxLength": 2}, "properties": {"abc": {}, "a": {"type": "null"}}},
     [{"ab": 1}, {"a": None}], [{"abc": 1}, {"a": 1}]),
    ({"type": "object", "properties": {"a": {}}, "unevaluatedProperties": False}, [{"a": 1}], [{"b": 1}]),
    (
        {"type": "object", "allOf": [{"properties": {"a": {}}}], "properties": {"b": {}}}
        | {"unevaluatedProperties": False},
        [{"b": 1, "a": 1}],
        [{"c": 1}],
    ),
    ({"unevaluatedProperties": True, "if": {"type": "string"}, "type": "integer"}, [1], ["a"]),
    ({"type": "string", "minLength": 2.0, "maxLength": 3.0}, ["ab"], ["a", "abcd"]),
    ({"$id": "http://x/y", "$defs": {"a": {"$id": "a.json", "type": "integer"}}, "$ref": "a.json"}, [1], ["a"]),
    ({"$ref": "#here", "$defs": {"a": {"$anchor": "here", "type": "integer"}}, "maximum": 3}, [3], [4]),
    ({"type": "object", "properties": {"a": {}, "b": {}}, "minProperties": 1}, [{"a": 1}, {"b": 1}], [{}]),
    ({"type": "string", "pattern": "^(?!ab).*$"}, ["", "a", "ac", "xab"], ["ab", "abc"]),
    ({"type": "string", "pattern": "^(?!aws:.*).{1,128}$"}, ["a", "awsx", "xaws:"], ["", "aws:", "aws:x"]),
    ({"type": "string", "pattern": "^(?=.*[A-Z])(?=.*\\d).{4,}$"}, ["aA1b", "1xxA"], ["abcd", "A1", "ABCD"]),
    ({"type": "string", "pattern": "^(?!-)[a-z-]{1,63}(?<!-)$"}, ["a", "a-b"], ["-a", "a-", ""]),
    ({"type": "string", "pattern": "^((?!foo).)*$"}, ["", "fo", "barfo"], ["foo", "xfoox"]),
    ({"type": "string", "pattern": "^(?!.*--)(?!^[0-9]+$)[a-z0-9-]*$"}, ["a-1", "1a"], ["a--b", "12"]),
    ({"type": "string", "pattern": "^[A-Z]{2}(?!ZZ)[A-Z]{2}$"}, ["ZZAA"], ["AAZZ"]),
    ({"type": "string", "not": {"pattern": "^ab"}}, ["", "a", "ac", "xab"], ["ab", "abc"]),
    ({"type": "string", "not": {"pattern": "[0-9]{2}|^x+$"}}, ["", "a1", "1a1", "xy"], ["12", "a12", "xx"]),
    ({"oneOf": [{"type": "string", "pattern": "^a"}, {"type": "string", "pattern": "b$"}]}, ["a", "b"], ["ab", "c"]),
    ({"type": "object", "patternProperties": {"^a": {"type": "integer"}, "b$": {"maximum": 5}},
      "additionalProperties": False}, [{"a": 9, "b": 5, "ab": 5}], [{"ab": 6}, {"ab": "x"}, {"c": 1}]),
    ({"type": "object", "patternProperties": {"^(?!x-)": {"type": "integer"}}, "additionalProperties": False},
     [{"a": 9}, {"x": 1}], [{"x-a": 6}, {"a": "b"}]),
    ({"type": "object", "patternProperties": {"^a": {"type": "integer"}}, "propertyNames": {"maxLength": 3},
      "additionalProperties": {"type": "null"}}, [{"ab": 9, "b": None}], [{"abcd": 6}, {"bcde": None}, {"b": 1}]),
    ({"type": "object", "patternProperties": {"^a": {"type": "integer"}, "^[^a]|^$": False}}, [{"a": 1}], [{"b": 1}]),
    ({"type": "object", "properties": {"a": {}, "b": {}, "c": {}}, "minProperties": 1, "maxProperties": 1},
     [{"a": 1}, {"c": 1}], [{}, {"a": 1, "b": 1}]),
    ({"type": "array", "items": {"type": "string"}, "uniqueItems": True, "minItems": 2, "maxItems": 2},
     [["ab", "c"]], [["a", "a"], ["a"]]),
    ({"type": "array", "items": {"type": "object", "properties": {"k": {"type": "integer"}}, "required": ["k"]},
      "uniqueItems": True, "maxItems": 2}, [[{"k": 1}, {"k": 2}], []], [[{"k": 1}, {"k": 1}]]),
    ({"type": "number", "minimum": -9223372036854775808, "maximum": 9223372036854775807}, [1.5, -3], [1e20]),
    ({"type": "string", "minLength": 1, "maxLength": 4294967296}, ["a"], [""]),
    ({"type": "object", "properties": {"k": {"type": "string"}}, "unevaluatedProperties": False,
      "if": {"required": ["k"]}, "then": {"properties": {"v": {"type": "integer"}}}},
     [{"k": "x", "v": 1}, {}], [{"v": 1}, {"k": "x", "w": 1}]),
    ({"type": "object", "anyOf": [{"properties": {"a": {"type": "integer"}}, "required": ["a"]},
      {"properties": {"b": {"type": "null"}}, "required": ["b"]}], "unevaluatedProperties": False},
     [{"a": 1}, {"b": None}], [{"c": 1}, {}]),
    ({"type": "array", "prefixItems": [{"type": "integer"}], "anyOf": [{"prefixItems": [True, {"type": "null"}]}, {}],
      "unevaluatedItems": False}, [[1], [1, None]], [[1, 2]]),
    ({"type": "object", "propertyNames": {"pattern": "^a", "minLength": 2}}, [{"ab": 1}], [{"a": 1}, {"bb": 1}]),
    ({"type": "object", "propertyNames": {"not": {"pattern": "^a"}}}, [{"b": 1}, {}], [{"a": 1}]),
    ({"type": "integer", "minLength": 4}, [1], ["abcd"]),
    ({"type": "object", "not": {"const": {"a": 1}}}, [{}, {"b": 1}], [{"a": 1}]),
    ({"type": "object", "required": ["a"], "minProperties": 2}, [{"a": 1, "b": 1}], [{"a": 1}]),
    ({"type": "object", "propertyNames": {"enum": ["aa!", "a a"]}, "patternProperties": {"a+$": {"const": "x"}}},
     [{"aa!": 1, "a a": "x"}], [{"a a": 1}, {"b": 1}]),
    ({"type": "object", "propertyNames": {"pattern": "a+$"}, "properties": {"aa!": {}, "ba": {}}},
     [{"ba": 1}], [{"aa!": 1}]),
    # A letter to some readers of patterns and to others none.
    ({"type": "object", "propertyNames": {"enum": ["é", "e"]}, "patternProperties": {"^\\w$": {"minimum": 2}},
      "additionalProperties": {"type": "integer", "maximum": 3}}, [{"é": 3, "e": 4}], [{"é": 1}, {"e": 1}]),
    # Patterns of few names: none of them comes twice, none is begun where all are there.
    ({"type": "object", "patternProperties": {"^(a|b|c)$": {"type": "integer"}}, "additionalProperties": False,
      "minProperties": 2}, [{"a": 1, "c": 2}, {"a": 1, "b": 1, "c": 1}], [{"a": 1}, {}, {"a": 1, "d": 1}]),
    ({"type": "object", "patternProperties": {"^[ab]$": {"type": "integer"}, "^[bc]$": {"minimum": 5}},
      "additionalProperties": False, "minProperties": 3}, [{"a": 1, "b": 5, "c": "x"}], [{"a": 1, "b": 1, "c": 5}]),
    ({"type": "object", "propertyNames": {"pattern": "^(en|de|fr)$"}, "minProperties": 2, "maxProperties": 2},
     [{"de": 1, "en": 2}], [{"en": 1}, {"de": 1, "en": 2, "fr": 3}]),
    ({"type": "object", "properties": {"a": {"type": "integer"}}, "patternProperties": {"^x[12]$": {"type": "null"}},
      "additionalProperties": False, "required": ["a"], "minProperties": 3},
     [{"a": 1, "x1": None, "x2": None}], [{"a": 1, "x1": None}]),
    ({"type": "object", "propertyNames": {"enum": ["a", "b", "c"]}, "maxProperties": 1},
     [{}, {"b": 1}], [{"a": 1, "b": 1}]),
    ({"type": "object", "propertyNames": {"enum": ["a", "b", "c"]}, "required": ["a"], "maxProperties": 2},
     [{"a": 1, "c": 1}], [{"a": 1, "b": 1, "c": 1}, {"b": 1}]),
    ({"type": "object", "properties": {"a": {"type": "integer"}}, "patternProperties": {"^a$": {"minimum": 3}},
      "additionalProperties": False}, [{"a": 3}, {}], [{"a": 1}, {"a": 3, "b": 1}]),
    ({"type": "object", "properties": {"a": {"type": "integer"}, "b": {}}, "propertyNames": {"pattern": "^[ab]$"}},
     [{"a": 3, "b": 1}, {}], [{"a": "x"}, {"c": 1}]),
    ({"type": "object", "properties": {"a": {}}, "required": ["a"],
      "propertyNames": {"anyOf": [{"const": "a"}, {"pattern": "^b$"}]}}, [{"a": 3, "b": 1}], [{"b": 1}]),
    ({"allOf": [{"type": "object", "properties": {"a": {"type": "integer"}}},
      {"patternProperties": {"^a$": {"minimum": 3}}, "additionalProperties": False}]}, [{"a": 3}, {}], [{"a": 1}]),
    ({"contains": {"const": 1}, "minContains": 3, "maxItems": 2}, [1, "a"], [[1, 1], []]),
    ({"type": "array", "contains": True, "minContains": 7, "maxContains": 8}, [[1] * 7], [[1] * 6, [1] * 9]),
]  # fmt: skip


# Each with the keyword and the place that the sentence names.
UNENFORCEABLE: list[tuple[dict[str, Any], str, str]] = [
    ({"type": "array", "items": {"type": "string"}, "uniqueItems": True, "minItems": 4}, "uniqueItems", "uniqueItems"),
    (
        {"properties": {"tags": {"type": "array", "items": {"type": "object"}, "uniqueItems": True}}},
        "uniqueItems",
        "properties.tags.uniqueItems",
    ),
    ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "oneOf", "oneOf"),
    ({"type": "string", "pattern": "\\bword\\b"}, "pattern", "pattern"),
    ({"type": "string", "pattern": "^(a|b)\\1$"}, "pattern", "pattern"),
    ({"properties": {"a": {"pattern": "(?<!x)b"}}}, "pattern", "properties.a.pattern"),
    ({"type": "object", "patternProperties": {"(?<=a)b": {}}}, "patternProperties", "patternProperties"),
    ({"$ref": "https://example.com/schema.json"}, "$ref", "$ref"),
    ({"properties": {"a": {"$ref": "file:///etc/passwd"}}}, "$ref", "properties.a.$ref"),
    ({"$dynamicRef": "http://x/y"}, "$dynamicRef", "$dynamicRef"),
    ({"type": "object", "propertyNames": {"format": "email"}}, "propertyNames", "propertyNames"),
    (
        {"type": "object", "propertyNames": {"enum": ["a"]}, "patternProperties": {"\\ba": {}}},
        "patternProperties",
        "patternProperties",
    ),
    ({"type": "array", "contains": {"const": 1}, "minContains": 65, "maxContains": 99}, "contains", "contains"),
    ({"type": "array", "contains": {"const": 1}, "minContains": 10**9, "maxItems": 2 * 10**9}, "contains", "contains"),
    # Free names may come twice, and would be counted so.
    ({"type": "object", "minProperties": 2}, "minProperties", "minProperties"),
    (
        {"type": "object", "propertyNames": {"pattern": "^[0-9]+$"}, "minProperties": 2},
        "minProperties",
        "minProperties",
    ),
    ({"type": "object", "not": {"maxProperties": 2}}, "maxProperties", "not"),
]


@pytest.mark.parametrize("schema, keyword, place", UNENFORCEABLE)
def test_what_cannot_be_enforced(schema: dict[str, Any], keyword: str, place: str) -> None:
    """An error for who insists, which names the keyword and its place; a warning for who does not."""
    with pytest.raises(RequestError) as error:
        compiler().compile(spec("json_schema", schema, param="here"))
    assert error.value.status == 400 and error.value.param == "here"
    assert f"`{keyword}`" in str(error.value) and f"`{place}`" in str(error.value)
    grammar = compiler().compile(spec("json_schema", schema, strict=False))
    assert any(f"`{keyword}`" in warning for warning in grammar.warnings)
    json.loads(walk(grammar, random.Random(1))[0])


@pytest.mark.parametrize("schema, valid, invalid", REWRITTEN)
def test_what_is_rewritten(schema: Any, valid: list[Any], invalid: list[Any]) -> None:
    """Keywords that the library lacks: values are held to them, and not to more than is said."""
    grammar = compiler().compile(spec("json_schema", schema))
    assert grammar.warnings == ()
    checker = jsonschema.Draft202012Validator(schema)
    for seed in range(4):
        checker.validate(json.loads(walk(grammar, random.Random(seed))[0]))
    for values, expected in ((valid, True), (invalid, False)):
        for value in values:
            assert checker.is_valid(value) is expected
            assert admits(grammar, value) is expected, value


@pytest.mark.parametrize(
    "schema",
    [
        {"propertyNames": {"enum": ["a" * 30 + "!"]}, "patternProperties": {"a+$": {"type": "string"}}},
        {"propertyNames": {"pattern": "a+$"}, "properties": {"a" * 30 + "!": {}}},
        {"patternProperties": {"\\p{" * 20_000: {}}},
    ],
)
def test_patterns_are_answered_in_time(schema: dict[str, Any]) -> None:
    """A search that goes back takes minutes for these."""
    with counted() as work:
        try:
            compiler().compile(spec("json_schema", {"type": "object", **schema}))
        except RequestError as error:
            assert error.status == 400
    assert work.num_calls < MAX_CALLS

"""JSON schemas that cover every keyword that is enforced: written by keyword, and put together from a seed."""

from __future__ import annotations

import random
from typing import Any

Schema = dict[str, Any]


def obj(properties: Schema, *required: str, **more: Any) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required), **more}


CLOSED: Schema = {"additionalProperties": False}
S: Schema = {"type": "string"}
I: Schema = {"type": "integer"}  # noqa: E741
N: Schema = {"type": "number"}
B: Schema = {"type": "boolean"}
FORMATS = ["date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"]
PATTERNS = [
    "^a+$",
    "^[a-z]{2,5}$",
    "^\\d{3}-\\d{4}$",
    "^(foo|bar)+$",
    "^[A-Z][a-z]*( [A-Z][a-z]*)?$",
    "b",
    "^x",
    "y$",
    "^$",
    "^.{3}$",
    "^\\w+\\.\\w{2,3}$",
    '^[^"\\\\]*$',
    "^[\\u00e0-\\u00ff]+$",
    "^\\s*end\\s*$",
    "^(a|b)(c|d)?e*$",
    "^[0-9a-f]{8}$",
    "^\\+?[0-9 ]{4,9}$",
    "^/[a-z/]*$",
    "^\\$[0-9]+(\\.[0-9]{2})?$",
    "^[\\u4e00-\\u9fff]{1,4}$",
]


def by_keyword() -> list[Schema]:
    """One thing at a time."""
    found: list[Schema] = [
        {"type": kind} for kind in ("string", "integer", "number", "boolean", "null", "array", "object")
    ]
    found += [{}, {"type": ["string", "null"]}, {"type": ["integer", "boolean"]}, {"type": ["array", "object", "null"]}]
    found += [{"title": "t", "description": "d", "default": 1, "examples": [1], "deprecated": True, "type": "integer"}]
    # Values.
    values: list[Any] = [None, True, 0, -7, 2.5, "", "a", "é", "日本", "😀", 'q"\\/\n', [], [1, "a"], {}, {"a": [None]}]
    found += [{"const": value} for value in values]
    found += [{"enum": values[start:]} for start in range(0, len(values) - 1, 2)]
    found += [{"type": "string", "enum": ["a", "ab", "abc"]}, {"type": ["string", "null"], "enum": ["x", None]}]
    found += [{"enum": [f"value {index}" for index in range(200)]}]
    # Strings.
    found += [{**S, "minLength": low, "maxLength": high} for low, high in ((0, 0), (0, 3), (2, 2), (1, 40), (5, 9))]
    found += [{**S, "minLength": 3}, {**S, "maxLength": 5}, {"maxLength": 2, "type": ["string", "integer"]}]
    found += [{**S, "pattern": pattern} for pattern in PATTERNS]
    found += [{**S, "pattern": "^[a-z]+$", "minLength": 2, "maxLength": 4}, {**S, "pattern": "a", "maxLength": 6}]
    found += [{**S, "format": name} for name in FORMATS]
    found += [{**S, "format": name} for name in ("binary", "password", "byte", "int32")]
    found += [obj({"when": {**S, "format": name}}, "when", **CLOSED) for name in FORMATS]
    # Numbers.
    for kind in (I, N):
        found += [
            {**kind, "minimum": 0},
            {**kind, "maximum": 100},
            {**kind, "exclusiveMinimum": 0},
            {**kind, "exclusiveMaximum": 0},
        ]
        found += [
            {**kind, "minimum": low, "maximum": high}
            for low, high in ((0, 0), (-5, 5), (10, 99), (-1000, -998), (7, 123456))
        ]
        found += [{**kind, "exclusiveMinimum": 3, "exclusiveMaximum": 9}, {**kind, "multipleOf": 5}]
        found += [{**kind, "multipleOf": 3, "minimum": 10, "maximum": 40}]
    found += [{**N, "minimum": 0.5, "maximum": 1.5}, {**N, "multipleOf": 0.5}, {**I, "multipleOf": 10, "minimum": 0}]
    found += [{**I, "format": "int32"}, {**N, "format": "double"}]
    # Arrays.
    for item in (S, I, B, {"enum": ["a", 1]}, {"type": "array", "items": I}, obj({"x": N}, "x", **CLOSED)):
        found += [{"type": "array", "items": item}, {"type": "array", "items": item, "minItems": 1, "maxItems": 3}]
    found += [{"type": "array", "items": I, "minItems": low} for low in (0, 1, 4)]
    found += [{"type": "array", "items": I, "maxItems": high} for high in (0, 1, 4)]
    found += [{"type": "array", "prefixItems": [S, I]}, {"type": "array", "prefixItems": [S, I], "items": False}]
    found += [{"type": "array", "prefixItems": [S, I], "items": B, "minItems": 2, "maxItems": 4}]
    found += [
        {"type": "array", "prefixItems": [S, I], "items": False, "minItems": 2},
        {"type": "array", "items": False},
    ]
    # Objects.
    found += [
        obj({"a": S, "b": I}),
        obj({"a": S, "b": I}, "a"),
        obj({"a": S, "b": I}, "b", "a"),
        obj({"a": S}, "a", "extra"),
    ]
    found += [obj({"a": S, "b": I}, **CLOSED), obj({"a": S, "b": I}, "a", "b", **CLOSED), obj({}, **CLOSED)]
    found += [obj({"a": S}, "a", additionalProperties=extra) for extra in (True, I, {"type": "array", "items": S})]
    found += [obj({"a": True, "b": {}}, "a")]
    found += [
        {"type": "object", "patternProperties": {"^n_": N}, **CLOSED},
        {"type": "object", "patternProperties": {"^s": S, "^i": I}},
    ]
    found += [obj({"id": I}, "id", patternProperties={"^x-": S}, **CLOSED)]
    found += [
        {"type": "object", "additionalProperties": I, "minProperties": 1},
        {"type": "object", "additionalProperties": I, "maxProperties": 1},
    ]
    found += [
        obj(
            {"": S, "ключ": I, "日本": B, "a b": N, 'q"uote': S, "back\\slash": I, "/~": B},
            "",
            "ключ",
            'q"uote',
            **CLOSED,
        )
    ]
    found += [obj({f"field_{index}": (S, I, B, N)[index % 4] for index in range(30)}, "field_3", "field_17", **CLOSED)]
    found += [obj({f"k{index}": S for index in range(12)}, *(f"k{index}" for index in range(12)), **CLOSED)]
    # Unions and intersections.
    found += [{"anyOf": [S, I]}, {"anyOf": [S, {"type": "null"}]}, {"anyOf": [obj({"a": S}, "a"), obj({"b": I}, "b")]}]
    found += [
        {
            "anyOf": [
                obj({"kind": {"const": kind}, "v": schema}, "kind", "v", **CLOSED)
                for kind, schema in (("s", S), ("i", I), ("l", {"type": "array"}))
            ]
        }
    ]
    found += [
        {"oneOf": [S, I, B]},
        {"oneOf": [{"const": 1}, {"const": 2}]},
        {"oneOf": [{"enum": ["a", "b"]}, {"type": "null"}]},
    ]
    found += [
        {
            "oneOf": [
                obj({"t": {"const": kind}, "v": schema}, "t", "v", **CLOSED) for kind, schema in (("x", S), ("y", I))
            ]
        }
    ]
    found += [{"oneOf": [obj({"n": {"const": n}, "v": schema}, "n", "v") for n, schema in ((1, S), (2, I))]}]
    found += [{"oneOf": [{"const": 1}, {"const": "1"}, {"enum": [True, None]}]}]
    found += [{"allOf": [I, {"minimum": 3}, {"maximum": 8}]}, {"allOf": [obj({"a": S}, "a"), obj({"b": I}, "b")]}]
    found += [{"allOf": [{"$ref": "#/$defs/base"}, obj({"more": B}, "more")], "$defs": {"base": obj({"id": I}, "id")}}]
    found += [
        {**S, "anyOf": [{"minLength": 5}, {"maxLength": 2}]},
        {"allOf": [{"enum": [1, 2, 3]}, {"enum": [2, 3, 4]}]},
    ]
    found += [{"allOf": [{**S, "pattern": "^a"}, {"pattern": "z$"}, {"maxLength": 6}]}]
    found += [
        obj({"v": {"anyOf": [{"type": "array", "items": S}, obj({"w": I}, "w"), {"const": "none"}]}}, "v", **CLOSED)
    ]
    # References and recursion.
    node: Schema = obj(
        {"value": I, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}, "value", "next", **CLOSED
    )
    tree: Schema = obj(
        {"name": S, "children": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2}}, "name", **CLOSED
    )
    found += [{"$ref": "#/$defs/node", "$defs": {"node": node}}, {"$ref": "#/$defs/tree", "$defs": {"tree": tree}}]
    found += [obj({"left": {"$ref": "#"}, "right": {"$ref": "#"}, "leaf": I}, **CLOSED)]
    found += [
        obj(
            {"a": {"$ref": "#/definitions/x"}, "b": {"$ref": "#/definitions/x"}},
            "a",
            "b",
            definitions={"x": {**S, "maxLength": 3}},
        )
    ]
    found += [obj({"a": {"$ref": "#/properties/b"}, "b": {**I, "minimum": 1}}, "a", **CLOSED)]
    found += [
        {
            "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/c"}, "c": {"enum": ["deep"]}},
            "$ref": "#/$defs/a",
        }
    ]
    found += [
        {
            "$defs": {"a/b": I, "c~d": S, "e f": B},
            "type": "array",
            "prefixItems": [{"$ref": "#/$defs/a~1b"}, {"$ref": "#/$defs/c~0d"}, {"$ref": "#/$defs/e%20f"}],
            "items": False,
            "minItems": 3,
        }
    ]
    found += [
        obj(
            {"even": {"$ref": "#/$defs/even"}},
            "even",
            **{
                "$defs": {
                    "even": {"anyOf": [{"type": "null"}, obj({"odd": {"$ref": "#/$defs/odd"}}, "odd", **CLOSED)]},
                    "odd": obj({"even": {"$ref": "#/$defs/even"}}, "even", **CLOSED),
                }
            },
        )
    ]
    return found


def draft7() -> list[Schema]:
    """What older schemas write differently."""
    mark = {"$schema": "http://json-schema.org/draft-07/schema#"}
    return [
        {**mark, "type": "array", "items": [S, I]},
        {**mark, "type": "array", "items": [S, I], "additionalItems": False},
        {**mark, "type": "array", "items": [S], "additionalItems": B, "minItems": 2, "maxItems": 3},
        {
            **mark,
            "$id": "http://example.com/a.json",
            **obj({"a": {"$ref": "#/definitions/d"}}, "a", definitions={"d": I}),
        },
    ]


def as_written_by_libraries() -> list[Schema]:
    """The shapes that pydantic, OpenAI's SDKs and OpenAPI generators send."""
    step = obj({"explanation": S, "output": S}, "explanation", "output", **CLOSED, title="Step")
    address = obj(
        {"street": {"title": "Street", **S}, "zip": {**S, "pattern": "^[0-9]{5}$"}}, "street", "zip", title="Address"
    )
    optional: Schema = {"anyOf": [S, {"type": "null"}], "default": None, "title": "Nick"}
    cat = obj({"kind": {"const": "cat", **S}, "lives": {**I, "minimum": 0, "maximum": 9}}, "kind", "lives", title="Cat")
    dog = obj({"kind": {"const": "dog", **S}, "good": B}, "kind", "good", title="Dog")
    return [
        obj(
            {"steps": {"type": "array", "items": {"$ref": "#/$defs/Step"}}, "final": S},
            "steps",
            "final",
            **CLOSED,
            **{"$defs": {"Step": step}},
        ),
        obj(
            {"name": S, "nick": optional, "home": {"$ref": "#/$defs/Address"}},
            "name",
            "home",
            **{"$defs": {"Address": address}},
            title="User",
        ),
        obj(
            {
                "pet": {
                    "oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}],
                    "discriminator": {"propertyName": "kind", "mapping": {}},
                }
            },
            "pet",
            **{"$defs": {"Cat": cat, "Dog": dog}},
        ),
        obj(
            {"color": {"$ref": "#/$defs/Color"}},
            "color",
            **{"$defs": {"Color": {"enum": ["red", "green"], "title": "Color", **S}}},
        ),
        obj({"scores": {"type": "object", "additionalProperties": N, "title": "Scores"}}, "scores"),
        obj({"point": {"type": "array", "prefixItems": [N, N], "minItems": 2, "maxItems": 2}}, "point"),
        obj(
            {
                "id": {**I, "format": "int64"},
                "when": {**S, "format": "date-time"},
                "tags": {"type": "array", "items": S, "maxItems": 3},
            },
            "id",
            "when",
        ),
        obj({"a": {"type": ["string", "null"]}, "b": {"type": ["integer", "null"]}}, "a", "b", **CLOSED),
    ]


def from_seed(seed: int) -> Schema:
    """A schema put together at random."""
    rng = random.Random(seed)

    def scalar() -> Schema:
        low = rng.randrange(-50, 50)
        return rng.choice(
            [
                S,
                I,
                N,
                B,
                {"type": "null"},
                {"const": rng.choice(["k", 3, None, "ü"])},
                {"enum": rng.sample(["a", "b", 1, 2.5, None, "ß"], 3)},
                {**I, "minimum": low, "maximum": low + rng.randrange(200)},
                {**N, "minimum": low, "maximum": low + rng.randrange(1, 20)},
                {**S, "pattern": rng.choice(PATTERNS)},
                {**S, "format": rng.choice(FORMATS)},
                {**S, "minLength": rng.randrange(3), "maxLength": rng.randrange(3, 12)},
                {**I, "multipleOf": rng.randrange(2, 9)},
                {**I, "exclusiveMinimum": low},
                {"$ref": "#/$defs/leaf"},
            ]
        )

    def any_of(depth: int) -> Schema:
        if depth == 0 or rng.random() < 0.25:
            return scalar()
        kind = rng.choice(["object", "object", "array", "tuple", "union", "map"])
        if kind == "object":
            names = rng.sample(["id", "name", "tags", "größe", "x y", "data", "next", "n"], rng.randrange(1, 5))
            made = obj({name: any_of(depth - 1) for name in names}, *(name for name in names if rng.random() < 0.6))
            if rng.random() < 0.7:
                made["additionalProperties"] = False
            return made
        if kind == "array":
            low = rng.randrange(3)
            return {"type": "array", "items": any_of(depth - 1), "minItems": low, "maxItems": low + rng.randrange(3)}
        if kind == "tuple":
            return {"type": "array", "prefixItems": [any_of(depth - 1), scalar()], "items": False, "minItems": 2}
        if kind == "union":
            return {"anyOf": [any_of(depth - 1), scalar(), {"type": "null"}]}
        return {"type": "object", "additionalProperties": any_of(depth - 1)}

    return {**any_of(rng.randrange(1, 4)), "$defs": {"leaf": {**S, "maxLength": 4}}}


SCHEMAS: list[Schema] = [*by_keyword(), *draft7(), *as_written_by_libraries(), *map(from_seed, range(160))]

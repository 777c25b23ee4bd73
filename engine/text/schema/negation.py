"""What a schema does not admit: for each keyword the values that break it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

from engine.text.schema.base import FORMATS, Rewriter
from engine.text.schema.errors import cannot
from engine.text.schema.parts import TYPES, all_of, any_of, at, item_at, names_of, type_of
from engine.text.schema.plain import NUMBERS
from engine.text.schema.strings import not_pattern, other_strings

_TYPE_OF = {
    **dict.fromkeys(("minLength", "maxLength", "pattern", "format"), "string"),
    **dict.fromkeys(NUMBERS, "number"),
    **dict.fromkeys(("minItems", "maxItems", "items", "prefixItems", "contains", "uniqueItems"), "array"),
}


# How far from 0 numbers are listed that are no multiples.
_MOST_APART = 100


def negations(rewriter: Rewriter, schema: dict[str, Any], where: str) -> Iterator[Callable[..., Any]]:
    """For each keyword, what writes the values that break it."""
    for key, value in schema.items():
        kind = _TYPE_OF.get(key)
        if (
            kind is not None
            and not rewriter.may_be(schema, kind)
            and not (kind == "number" and rewriter.may_be(schema, "integer"))
        ):
            continue
        match key:
            case "type":
                yield lambda value=value: not_types(value)
            case "const" | "enum":
                yield lambda key=key, value=value: not_values([value] if key == "const" else value)
            case "minLength" | "minItems" | "minProperties":
                kind = {"minLength": "string", "minItems": "array"}.get(key, "object")
                most = key.replace("min", "max")
                yield (
                    lambda kind=kind, most=most, value=value: {"type": kind, most: value - 1} if value > 0 else False
                )
            case "maxLength" | "maxItems" | "maxProperties":
                kind = {"maxLength": "string", "maxItems": "array"}.get(key, "object")
                least = key.replace("max", "min")
                if key == "maxProperties" and value > 0:
                    yield lambda: cannot("maxProperties", where, "cannot be turned round")
                    continue
                yield lambda kind=kind, least=least, value=value: {"type": kind, least: value + 1}
            case "minimum":
                yield lambda value=value: {"type": "number", "exclusiveMaximum": value}
            case "maximum":
                yield lambda value=value: {"type": "number", "exclusiveMinimum": value}
            case "exclusiveMinimum":
                yield lambda value=value: {"type": "number", "maximum": value}
            case "exclusiveMaximum":
                yield lambda value=value: {"type": "number", "minimum": value}
            case "properties":
                for name, inner in value.items():
                    yield lambda name=name, inner=inner: all_of(
                        [
                            {
                                "type": "object",
                                "required": [name],
                                "properties": {name: rewriter.no(inner, at(where, f"properties.{name}"))},
                            }
                        ]
                    )
            case "required":
                for name in names_of(value):
                    yield lambda name=name: {"type": "object", "properties": {name: False}}
            case "items":
                begin = len(schema.get("prefixItems", []))
                yield lambda value=value, begin=begin: any_of(
                    [item_at(place, rewriter.no(value, at(where, "items"))) for place in range(begin, begin + 3)]
                )
            case "prefixItems":
                for place, inner in enumerate(value):
                    yield lambda place=place, inner=inner: item_at(place, rewriter.no(inner, where))
            case "contains" if schema.get("minContains", 1) == 1:
                yield lambda value=value: {"type": "array", "items": rewriter.no(value, at(where, "contains"))}
            case "dependentRequired":
                for name, names in value.items():
                    for other in names_of(names):
                        yield lambda name=name, other=other: {
                            "type": "object", "required": [name], "properties": {other: False}
                        }  # fmt: skip
            case "dependentSchemas":
                for name, inner in value.items():
                    yield lambda name=name, inner=inner: all_of(
                        [{"type": "object", "required": [name]}, rewriter.no(inner, where)]
                    )
            case "allOf":
                for inner in value:
                    yield lambda inner=inner: rewriter.no(inner, where)
            case "anyOf" | "oneOf":
                yield lambda value=value: all_of([rewriter.no(inner, where) for inner in value])
            case "not":
                yield lambda value=value: rewriter.yes(value, where)
            case "if" if "then" in schema or "else" in schema:
                yield lambda: all_of([rewriter.yes(schema["if"], where), rewriter.no(schema.get("then", True), where)])
                yield lambda: all_of([rewriter.no(schema["if"], where), rewriter.no(schema.get("else", True), where)])
            case "$ref":
                yield lambda value=value: rewriter.no(rewriter.references.target(value, schema, where), where)
            case "pattern":
                yield lambda value=value: {"type": "string", "pattern": not_pattern(rewriter, value, where)}
            case "format" if value in FORMATS:
                yield lambda: cannot("format", where, "cannot be turned round")
            case "multipleOf":
                yield lambda value=value: not_multiples(value, whole="number" not in rewriter.types.types(schema))
            case "uniqueItems" | "propertyNames" | "patternProperties" | "$dynamicRef" as word:
                if not (word == "uniqueItems" and value is False):
                    yield lambda word=word: cannot(word, where, "cannot be turned round")
            case "additionalProperties" | "unevaluatedProperties" | "unevaluatedItems" as word:
                if value is not True and value != {}:
                    yield lambda word=word: cannot(word, where, "cannot be turned round")


def not_types(value: Any) -> Any:
    given = {value} if isinstance(value, str) else set(value)
    # A number that is no integer is beyond the library; without it the rest is still right.
    left = [name for name in TYPES if name not in given and not (name == "number" and "integer" in given)]
    return {"type": left} if left else False


def not_multiples(step: float, *, whole: bool) -> Any:
    """Numbers between the multiples that are nearest to 0. whole: no others are admitted."""
    exact = Fraction(str(step))
    if exact <= 0:
        return False
    found = [value for value in range(-_MOST_APART, _MOST_APART + 1) if (Fraction(value) / exact).denominator != 1]
    if whole or found:
        return {"enum": found} if found else False
    # Every integer is a multiple, but nothing is half a step away from one.
    halves = (float(exact * place + exact / 2) for place in range(-10, 10))
    return {"enum": [value for value in halves if (Fraction(str(value)) / exact).denominator != 1]}


def not_values(values: list[Any]) -> Any:
    by_type: dict[str, list[Any]] = {}
    for value in values:
        by_type.setdefault(type_of(value), []).append(value)
    cases: list[Any] = [{"type": [name for name in TYPES if name not in by_type]}] if len(by_type) < len(TYPES) else []
    for kind, listed in by_type.items():
        if kind == "boolean":
            cases += [{"const": value} for value in (True, False) if value not in listed]
        elif kind == "string":
            cases.append({"type": "string", "pattern": other_strings(listed)})
        elif kind == "number":
            points = sorted(set(listed))
            bounds = [None, *points, None]
            for low, high in itertools.pairwise(bounds):
                case: dict[str, Any] = {"type": "number"}
                if low is not None:
                    case["exclusiveMinimum"] = low
                if high is not None:
                    case["exclusiveMaximum"] = high
                cases.append(case)
        elif kind == "array":
            cases.append({"type": "array", "minItems": max(map(len, listed)) + 1})
        elif kind == "object":
            # Without one name of each of them, whatever else is there.
            case = {"type": "object", "properties": {next(iter(value)): False for value in listed if value}}
            cases.append(case if {} not in listed else {**case, "minProperties": 1})
    return any_of(cases)

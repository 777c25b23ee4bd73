"""Objects: names of properties, how many there are, and `unevaluatedProperties`."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

from engine.text.schema.base import FORMATS, MAX_CASES, Rewriter
from engine.text.schema.errors import Unwritable
from engine.text.schema.parts import TYPES, all_of, any_of, at, names_of
from engine.text.schema.plain import plain
from engine.text.schema.strings import readable_pattern


def property_counts(rewriter: Rewriter, schema: dict[str, Any], where: str) -> dict[str, Any]:
    """minProperties and maxProperties where they say something, and the library can count."""
    low, high = schema.get("minProperties", 0), schema.get("maxProperties")
    required = set(names_of(schema.get("required")))
    optional = set(schema.get("properties", {})) - required
    closed = schema.get("additionalProperties") is False and not schema.get("patternProperties")
    found: dict[str, Any] = {}
    missing = low - len(required)
    if missing > 0 and not optional:
        # The library lets a free name come twice, so it counts right up to one of them.
        error = Unwritable("minProperties", at(where, "minProperties"), "free names might be the same name twice")
        if missing > 1 and rewriter.strict and rewriter.may_be(schema, "object"):
            raise error
        if missing > 1:
            rewriter.warn(error)
        found["minProperties"] = low
    if high is not None and not (closed and len(schema.get("properties", {})) <= high):
        found["maxProperties"] = high
    return found


def property_names(rewriter: Rewriter, schema: dict[str, Any], where: str) -> Any:
    here = at(where, "propertyNames")
    names = schema["propertyNames"]
    if names is True or not rewriter.may_be(schema, "object"):
        return True
    if names is False or (isinstance(names, dict) and "string" not in rewriter.types.types(names)):
        return {"additionalProperties": False}
    if isinstance(names, dict) and set(names) == {"$ref"}:
        names = rewriter.references.target(names["$ref"], names, here)
    names = plain(names, rewriter.invalid) if isinstance(names, dict) else {}
    told = {key for key in names if key not in ("type", "description", "title", "$comment", "$schema", "examples")}
    if not told or (told == {"format"} and names["format"] not in FORMATS):
        return True
    if told <= {"enum", "const"}:
        values = [name for name in rewriter.types.values(names) or [] if isinstance(name, str)]
        rest, inner = schema.get("additionalProperties", True), schema.get("properties", {})
        patterns = schema.get("patternProperties")
        if patterns:
            raise Unwritable("propertyNames", here, "stands beside `patternProperties`")
        written = {name: rewriter.yes(inner.get(name, rest), at(where, "additionalProperties")) for name in values}
        return {"properties": written, "additionalProperties": False}
    if told == {"pattern"}:
        pattern = readable_pattern(rewriter, names["pattern"], here, "propertyNames")
    elif told <= {"minLength", "maxLength"}:
        pattern = f"^[\\s\\S]{{{names.get('minLength', 0)},{names.get('maxLength', '')}}}$"
    else:
        raise Unwritable("propertyNames", here, "can be kept for one pattern, a length, or names that are listed")
    if pattern is None:
        return True
    given = schema.get("patternProperties", {})
    if given and set(given) != {pattern}:
        raise Unwritable("propertyNames", here, "stands beside `patternProperties`")
    forbidden = {}
    for name in schema.get("properties", {}):
        try:
            matches = re.search(pattern, name) is not None
        except re.error:
            raise Unwritable("propertyNames", here, "cannot be compared with the names of `properties`") from None
        if not matches:
            forbidden[name] = False
    inner = {**given} or {pattern: True}
    return {"properties": forbidden, "patternProperties": dict.fromkeys(inner, True), "additionalProperties": False}


def min_properties(rewriter: Rewriter, schema: dict[str, Any], where: str) -> Any:
    """minProperties beside optional properties: some of them are there."""
    required = names_of(schema.get("required"))
    missing = schema["minProperties"] - len(set(required))
    optional = [name for name, inner in schema["properties"].items() if name not in required and inner is not False]
    if missing <= 0 or not rewriter.may_be(schema, "object"):
        return True
    if not optional:
        return True
    if missing > len(optional) or math.comb(len(optional), missing) > MAX_CASES:
        raise Unwritable("minProperties", at(where, "minProperties"), "has too many properties to choose from")
    return any_of(
        [{"type": [name for name in TYPES if name != "object"]}]
        + [{"type": "object", "required": list(names)} for names in itertools.combinations(optional, missing)]
    )


def unevaluated_properties(rewriter: Rewriter, schema: dict[str, Any], where: str) -> Any:
    rest, here = schema["unevaluatedProperties"], at(where, "unevaluatedProperties")
    if rest is True or rest == {} or "additionalProperties" in schema or not rewriter.may_be(schema, "object"):
        return True
    unions = [key for key in ("anyOf", "oneOf") if key in schema]
    if len(unions) > 1 or "if" in schema or "dependentSchemas" in schema:
        raise Unwritable("unevaluatedProperties", here, "stands beside conditions")
    written = rewriter.yes(rest, here)
    own = {key: value for key, value in schema.items() if key not in ("anyOf", "oneOf", "unevaluatedProperties")}
    names = _evaluated(rewriter, own, here, 0)
    cases: list[Any] = []
    for branch in schema[unions[0]] if unions else (True,):
        more = _evaluated(rewriter, branch, here, 0)
        if names is None or more is None:
            cases.append(rewriter.yes(branch, here))
            continue
        closed: dict[str, Any] = {
            "properties": dict.fromkeys([*names[0], *more[0]], True), "additionalProperties": written
        }  # fmt: skip
        if names[1] or more[1]:
            closed["patternProperties"] = dict.fromkeys([*names[1], *more[1]], True)
        cases.append(all_of([rewriter.yes(branch, here), closed]))
    return any_of(cases)


def _evaluated(rewriter: Rewriter, schema: Any, here: str, depth: int) -> tuple[set[str], set[str]] | None:
    """Names and patterns that a schema looks at whenever it holds; None for all."""
    names: set[str] = set()
    patterns: set[str] = set()
    if not isinstance(schema, dict):
        return names, patterns
    if depth > 12 or any(key in schema for key in ("anyOf", "oneOf", "if", "dependentSchemas", "$dynamicRef")):
        raise Unwritable("unevaluatedProperties", here, "stands beside conditions")
    if "additionalProperties" in schema or "unevaluatedProperties" in schema:
        return None
    names |= set(schema.get("properties", {}))
    patterns |= set(schema.get("patternProperties", {}))
    parts = list(schema.get("allOf", []))
    if "$ref" in schema:
        parts.append(rewriter.references.target(schema["$ref"], schema, here))
    for part in parts:
        more = _evaluated(rewriter, part, here, depth + 1)
        if more is None:
            return None
        names |= more[0]
        patterns |= more[1]
    return names, patterns

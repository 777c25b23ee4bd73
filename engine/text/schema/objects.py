"""Objects: names of properties, how many there are, and `unevaluatedProperties`."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

from engine.text.schema.base import MAX_CASES, Rewriter
from engine.text.schema.errors import Unwritable
from engine.text.schema.names import is_listed
from engine.text.schema.parts import TYPES, all_of, any_of, at, names_of


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
    """`propertyNames` where it admits nothing, or names that are listed; for the rest see `name_keywords`."""
    here = at(where, "propertyNames")
    names = schema["propertyNames"]
    if names is True or not rewriter.may_be(schema, "object"):
        return True
    if names is False or (isinstance(names, dict) and "string" not in rewriter.types.types(names)):
        return {"additionalProperties": False}
    if not isinstance(names, dict) or not is_listed(rewriter, names, here):
        return True
    values = [name for name in rewriter.types.values(names) or [] if isinstance(name, str)]
    rest, inner = schema.get("additionalProperties", True), schema.get("properties", {})
    patterns = schema.get("patternProperties", {})
    written = {}
    for name in values:
        try:
            parts = [part for pattern, part in patterns.items() if re.search(pattern, name)]
        except re.error:
            raise Unwritable("propertyNames", here, "cannot be compared with `patternProperties`") from None
        parts += [inner[name]] if name in inner else []
        written[name] = all_of([rewriter.yes(part, at(where, f"properties.{name}")) for part in parts or [rest]])
    return {"properties": written, "additionalProperties": False}


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

"""Objects: names of properties, how many there are, and `unevaluatedProperties`."""

from __future__ import annotations

import itertools
import math
from typing import Any

from engine.text.schema.base import MAX_CASES, Rewriter
from engine.text.schema.errors import Unwritable
from engine.text.schema.names import is_listed
from engine.text.schema.parts import TYPES, all_of, any_of, at, names_of
from engine.text.schema.patterns import Unreadable


def property_counts(rewriter: Rewriter, schema: dict[str, Any], where: str) -> dict[str, Any]:
    """minProperties and maxProperties where they say something, and the library can count."""
    low, high = schema.get("minProperties", 0), schema.get("maxProperties")
    required = set(names_of(schema.get("required")))
    optional = set(known_names(rewriter, schema, where)) - required
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
    if high is not None and not optional:
        found["maxProperties"] = high
    return found


def known_names(rewriter: Rewriter, schema: dict[str, Any], where: str) -> list[str]:
    """Names that a schema speaks of: of its `properties`, or those that its `propertyNames` lists."""
    properties, names = schema.get("properties", {}), schema.get("propertyNames")
    if not isinstance(names, dict) or not is_listed(rewriter, names, at(where, "propertyNames")):
        return [name for name, inner in properties.items() if inner is not False]
    rest = True if schema.get("patternProperties") else schema.get("additionalProperties", True)
    listed = names_of(rewriter.types.values(names))
    return [name for name in listed if properties.get(name, rest) is not False]


def max_properties(rewriter: Rewriter, schema: dict[str, Any], where: str) -> Any:
    """maxProperties beside optional properties: one case for each choice of them, and no free names."""
    required = set(names_of(schema.get("required")))
    optional = [name for name in known_names(rewriter, schema, where) if name not in required]
    room = schema["maxProperties"] - len(required)
    names = schema.get("propertyNames")
    listed = isinstance(names, dict) and is_listed(rewriter, names, where)
    closed = listed or (schema.get("additionalProperties") is False and not schema.get("patternProperties"))
    if not optional or not rewriter.may_be(schema, "object") or (closed and room >= len(optional)):
        return True
    others = {"type": [name for name in TYPES if name != "object"]}
    if room < 0:
        return others
    if math.comb(len(optional), min(room, len(optional))) > MAX_CASES:
        raise Unwritable("maxProperties", at(where, "maxProperties"), "has too many properties to choose from")
    cases = [
        {
            "type": "object",
            "properties": {name: name in chosen for name in optional} | dict.fromkeys(sorted(required), True),
            "additionalProperties": False,
        }
        for chosen in itertools.combinations(optional, min(room, len(optional)))
    ]
    return any_of([others, *cases])


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
    has = rewriter.languages.has
    for name in values:
        try:
            parts = [part for pattern, part in patterns.items() if has(name, [pattern], widely=True)]
            is_other = name not in inner and not any(has(name, [pattern], widely=False) for pattern in patterns)
        except Unreadable as error:
            why = f"cannot be compared with `patternProperties`: a pattern {error}"
            raise Unwritable("propertyNames", here, why) from None
        parts += [inner[name]] if name in inner else []
        # Where readers of patterns differ it is held to both.
        parts += [rest] if is_other else []
        written[name] = all_of([rewriter.yes(part, at(where, f"properties.{name}")) for part in parts])
    return {"properties": written, "additionalProperties": False}


def min_properties(rewriter: Rewriter, schema: dict[str, Any], where: str) -> Any:
    """minProperties beside optional properties: some of them are there."""
    required = names_of(schema.get("required"))
    missing = schema["minProperties"] - len(set(required))
    optional = [name for name in known_names(rewriter, schema, where) if name not in required]
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

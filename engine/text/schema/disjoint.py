"""Whether two schemas exclude each other, as far as it can be told from their words."""

from __future__ import annotations

import re
from typing import Any

from engine.text.schema.base import Rewriter
from engine.text.schema.errors import Unwritable
from engine.text.schema.parts import canonical, is_number, names_of, wide
from engine.text.schema.patterns import Unreadable

MAX_LISTED = 40  # values that are compared with a pattern


def disjoint(rewriter: Rewriter, left: Any, right: Any, depth: int) -> bool:
    """Whether no value is of both; False where it cannot be told."""
    if left is False or right is False:
        return True
    if depth > 6 or not isinstance(left, dict) or not isinstance(right, dict):
        return False
    mine, other = rewriter.types.types(left), rewriter.types.types(right)
    if not wide(mine) & wide(other):
        return True
    values, rivals = rewriter.types.values(left), rewriter.types.values(right)
    if values is not None and rivals is not None and not set(map(canonical, values)) & set(map(canonical, rivals)):
        return True
    left, right = resolved(rewriter, left), resolved(rewriter, right)
    for one, two in ((left, right), (right, left)):
        for key in ("anyOf", "oneOf"):
            branches = one.get(key)
            if (
                isinstance(branches, list)
                and branches
                and all(disjoint(rewriter, inner, two, depth + 1) for inner in branches)
            ):
                return True
        if any(disjoint(rewriter, inner, two, depth + 1) for inner in one.get("allOf") or ()):
            return True
    shared = wide(mine) & wide(other)
    if shared == {"number"}:
        return _above(left, right) or _above(right, left)
    if shared == {"string"}:
        return _counts_apart(left, right, "Length") or _patterns_apart(rewriter, left, right)
    if shared == {"array"}:
        return _counts_apart(left, right, "Items")
    if shared != {"object"}:
        return False
    for name in {*names_of(left.get("required")), *names_of(right.get("required"))}:
        inners = [_property(one, name) for one in (left, right)]
        if disjoint(rewriter, inners[0], inners[1], depth + 1):
            return True
    return False


def _patterns_apart(rewriter: Rewriter, left: dict[str, Any], right: dict[str, Any]) -> bool:
    """Whether no string matches the patterns, or is one of the values, of both."""
    mine, other = _pattern(left), _pattern(right)
    if mine is None or other is None:
        return False
    try:
        return rewriter.languages.is_empty([mine, other])
    except Unreadable:
        return False


def _pattern(schema: dict[str, Any]) -> str | None:
    if isinstance(schema.get("pattern"), str):
        return str(schema["pattern"])
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list) and 0 < len(values) <= MAX_LISTED:
        return f"^(?:{'|'.join(re.escape(value) for value in values if isinstance(value, str))})$"
    return None


def resolved(rewriter: Rewriter, schema: dict[str, Any]) -> dict[str, Any]:
    for _ in range(8):
        if set(schema) - {"description", "title"} != {"$ref"}:
            break
        try:
            found = rewriter.references.target(schema["$ref"], schema, "")
        except Unwritable:
            break
        if not isinstance(found, dict):
            break
        schema = found
    return schema


def _property(schema: dict[str, Any], name: str) -> Any:
    properties = schema.get("properties")
    if isinstance(properties, dict) and name in properties:
        return properties[name]
    if schema.get("patternProperties"):
        return True
    return schema.get("additionalProperties", True)


def _above(left: dict[str, Any], right: dict[str, Any]) -> bool:
    """Whether the numbers of one end below those of the other."""
    for end, ends in (("maximum", False), ("exclusiveMaximum", True)):
        for begin, begins in (("minimum", False), ("exclusiveMinimum", True)):
            high, low = left.get(end), right.get(begin)
            if is_number(high) and is_number(low) and (high < low or (high == low and (ends or begins))):
                return True
    return False


def _counts_apart(left: dict[str, Any], right: dict[str, Any], what: str) -> bool:
    for one, two in ((left, right), (right, left)):
        high, low = one.get(f"max{what}"), two.get(f"min{what}")
        if is_number(high) and is_number(low) and high < low:
            return True
    return False

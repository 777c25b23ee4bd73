"""Arrays: `contains`, `uniqueItems` and `unevaluatedItems` as unions of what can be written."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

from engine.text.schema.base import MAX_CASES, MAX_POSITION, Rewriter
from engine.text.schema.disjoint import disjoint
from engine.text.schema.errors import Unwritable, cannot
from engine.text.schema.parts import TYPES, any_of, at, canonical


def contains(rewriter: Rewriter, schema: dict[str, Any], where: str) -> Any:
    inner, low, high = schema["contains"], schema.get("minContains", 1), schema.get("maxContains")
    here = at(where, "contains")
    if high is not None and high < low:
        return {"type": [name for name in TYPES if name != "array"]}
    yes = rewriter.yes(inner, here)
    most = min(schema.get("maxItems", MAX_POSITION), MAX_POSITION + low)
    others: Any = [name for name in TYPES if name != "array"]
    cases: list[Any] = [{"type": others}]
    if high is None:
        if low == 0:
            return True
        if yes is True:
            return {"minItems": low}
        if low > most:
            return False if low > schema.get("maxItems", low) else cannot("contains", here, "asks for many")
        for places in itertools.islice(itertools.combinations(range(most), low), MAX_CASES):
            prefix = [yes if place in places else True for place in range(places[-1] + 1)]
            cases.append({"type": "array", "prefixItems": prefix, "minItems": len(prefix)})
        return any_of(cases)
    no = rewriter.no(inner, here)
    for count in range(low, min(high, most) + 1):
        for places in itertools.islice(itertools.combinations(range(most), count), MAX_CASES // 4):
            prefix = [yes if place in places else no for place in range(places[-1] + 1)] if places else []
            cases.append({"type": "array", "prefixItems": prefix, "items": no, "minItems": len(prefix)})
    return any_of(cases)


def unique_items(rewriter: Rewriter, schema: dict[str, Any], where: str) -> Any:
    """Arrays of values that are listed, none of them twice: all such arrays, up to a length that can be written."""
    low, high = schema.get("minItems", 0), schema.get("maxItems")
    if high is not None and high <= 1:
        return True
    if not rewriter.may_be(schema, "array"):
        return True
    prefix, items = schema.get("prefixItems", []), schema.get("items", True)
    if items is False and prefix:
        if _apart(rewriter, prefix):
            return True
    elif not prefix:
        values = _listed(rewriter, items)
        if values is not None:
            return _permutations(rewriter, values, low, high, where)
    raise Unwritable("uniqueItems", at(where, "uniqueItems"), "can be kept only where the items are listed by `enum`")


def _apart(rewriter: Rewriter, schemas: list[Any]) -> bool:
    return all(disjoint(rewriter, left, right, 0) for left, right in itertools.combinations(schemas, 2))


def _listed(rewriter: Rewriter, schema: Any) -> list[Any] | None:
    """All values of a schema, where they are few and listed; None else."""
    values = rewriter.types.values(schema)
    if values is None and rewriter.types.types(schema) <= {"boolean", "null"}:
        kinds = rewriter.types.types(schema)
        values = ([True, False] if "boolean" in kinds else []) + ([None] if "null" in kinds else [])
    if values is None or len(values) > 400:
        return None
    return [json.loads(text) for text in dict.fromkeys(map(canonical, values))]


def _permutations(rewriter: Rewriter, values: list[Any], low: int, high: int | None, where: str) -> Any:
    most = len(values) if high is None else min(high, len(values))
    if low > most:
        return {"type": [name for name in TYPES if name != "array"]}
    # The last place may hold any of the values that are left, so a case is a choice of those before it.
    length = min(most, max(low, 2))
    if math.perm(len(values), max(length - 1, 0)) > 2 * MAX_CASES:
        raise Unwritable("uniqueItems", at(where, "uniqueItems"), "has too many values to choose from")
    while length < most and math.perm(len(values), length) <= MAX_CASES:
        length += 1
    cases: list[Any] = [{"type": [name for name in TYPES if name != "array"]}]
    if low == 0:
        cases.append({"type": "array", "maxItems": 0})
    for count in range(max(1, low), length + 1) if length < 3 else (length,):
        for chosen in itertools.permutations(range(len(values)), count - 1):
            left = [value for index, value in enumerate(values) if index not in chosen]
            prefix = [{"const": values[index]} for index in chosen]
            # From three on one case holds the shorter ones too: fewer of the chosen, then the end.
            least = max(low, min(count - 1, 1)) if length >= 3 else count
            case = {"type": "array", "prefixItems": [*prefix, {"enum": left}], "items": False}
            cases.append({**case, "minItems": least, "maxItems": count})
    return any_of(cases)

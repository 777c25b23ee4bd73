"""Arrays: `contains`, `uniqueItems` and `unevaluatedItems` as unions of what can be written."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

from engine.text.schema.base import MAX_CASES, MAX_POSITION, Rewriter
from engine.text.schema.disjoint import disjoint, resolved
from engine.text.schema.errors import Unwritable, cannot
from engine.text.schema.parts import TYPES, any_of, at, canonical, names_of

MAX_CONTAINED = 64  # entries that a `contains` may ask for
MAX_PLACES = 1_200  # of all cases of a `contains`
MAX_FREE = 3  # items that are not listed and yet none of them twice: each begins otherwise
# By their first characters strings are told apart.
_LETTERS = (
    "aA", "bB", "cC", "dD", "eEfF", "gGhH", "iIjJkK", "lL", "mM", "nNoO", "pPqQ", "rR", "sS", "tT", "uUvVwWxXyYzZ",
    "0-4", "5-9",
)  # fmt: skip


def contains(rewriter: Rewriter, schema: dict[str, Any], where: str) -> Any:
    inner, low, high = schema["contains"], schema.get("minContains", 1), schema.get("maxContains")
    here = at(where, "contains")
    if high is not None and high < low:
        return {"type": [name for name in TYPES if name != "array"]}
    if low == 0 and high is None:
        return True
    others: Any = [name for name in TYPES if name != "array"]
    if low > schema.get("maxItems", low):
        return {"type": others}
    yes = rewriter.yes(inner, here)
    if yes is True:
        return {"minItems": low, **({} if high is None else {"maxItems": high})}
    if low > MAX_CONTAINED:
        cannot("contains", here, f"asks for more than {MAX_CONTAINED}")
    most = min(schema.get("maxItems", max(MAX_POSITION, low + 2)), MAX_POSITION + low)
    cases: list[Any] = [{"type": others}]
    # So many cases that all of them together stay a schema of a size that can be written.
    most_cases = max(1, min(MAX_CASES, MAX_PLACES // max(low, 1)))
    if high is None:
        for places in itertools.islice(itertools.combinations(range(most), low), most_cases):
            prefix = [yes if place in places else True for place in range(places[-1] + 1)]
            cases.append({"type": "array", "prefixItems": prefix, "minItems": len(prefix)})
        return any_of(cases)
    no = rewriter.no(inner, here)
    for count in range(low, min(high, most, low + MAX_POSITION) + 1):
        for places in itertools.islice(itertools.combinations(range(most), count), most_cases // 4 or 1):
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
    if items is False or (high is not None and high <= len(prefix)):
        most = len(prefix) if high is None else min(high, len(prefix))
        if _apart(rewriter, prefix[:most]):
            return True
        return _listed_places(rewriter, prefix[:most], low, where)
    if prefix:
        # No more than the first ones, which is all that is known.
        return _listed_places(rewriter, prefix, low, where)
    values = _listed(rewriter, items)
    if values is not None:
        return _permutations([{"const": value} for value in values], low, high, where)
    if high is not None and high <= MAX_FREE:
        classes = _classes(rewriter, items, 0)
        if len(classes) >= high:
            return _permutations(classes, low, high, where)
    why = f"can be kept where the items are listed by `enum`, or where there are at most {MAX_FREE} strings or numbers"
    raise Unwritable("uniqueItems", at(where, "uniqueItems"), why)


def _listed_places(rewriter: Rewriter, prefix: list[Any], low: int, where: str) -> Any:
    """The first items only, each choice of values of which none comes twice."""
    here = at(where, "uniqueItems")
    places = [_listed(rewriter, schema) for schema in prefix]
    if low > len(prefix) or any(place is None for place in places):
        raise Unwritable("uniqueItems", here, "can be kept only where the first items are listed by `enum`")
    listed = [place for place in places if place is not None]
    if math.prod(map(len, listed)) > MAX_CASES:
        raise Unwritable("uniqueItems", here, "has too many values to choose from")
    cases: list[Any] = [{"type": [name for name in TYPES if name != "array"]}]
    for values in itertools.product(*listed):
        if len(set(map(canonical, values))) == len(values):
            consts = [{"const": value} for value in values]
            cases.append({"type": "array", "prefixItems": consts, "items": False, "minItems": low})
    return any_of(cases)


def _classes(rewriter: Rewriter, schema: Any, depth: int) -> list[dict[str, Any]]:
    """Parts of a schema's values that share none with each other; empty where there are none to be told."""
    types = rewriter.types.types(schema)
    if types == {"string"}:
        return [{"type": "string", "pattern": f"^[{letters}]"} for letters in _LETTERS]
    if types and types <= {"integer", "number"}:
        kind = "integer" if types == {"integer"} else "number"
        return [
            {"type": kind, **({} if low is None else {"minimum": low}), **({} if high is None else {bound: high})}
            for low, high in itertools.pairwise((None, 0, 1, 2, 3, 4, 5, 10, 20, 50, 100, 1000, None))
            for bound in ("exclusiveMaximum",)
        ]
    if types != {"object"} or not isinstance(schema, dict) or depth > 4:
        return []
    schema = resolved(rewriter, schema)
    for name in names_of(schema.get("required")):
        inner = schema.get("properties", {}).get(name)
        values = None if inner is None else _listed(rewriter, inner)
        classes = [{"const": value} for value in values or ()] or _classes(rewriter, inner, depth + 1)
        if len(classes) > 1:
            return [{"type": "object", "required": [name], "properties": {name: one}} for one in classes]
    return []


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


def _permutations(choices: list[dict[str, Any]], low: int, high: int | None, where: str) -> Any:
    most = len(choices) if high is None else min(high, len(choices))
    if low > most:
        return {"type": [name for name in TYPES if name != "array"]}
    # The last place may hold any of the values that are left, so a case is a choice of those before it.
    length = min(most, max(low, 2))
    if math.perm(len(choices), max(length - 1, 0)) > 2 * MAX_CASES:
        raise Unwritable("uniqueItems", at(where, "uniqueItems"), "has too many values to choose from")
    while length < most and math.perm(len(choices), length) <= MAX_CASES:
        length += 1
    cases: list[Any] = [{"type": [name for name in TYPES if name != "array"]}]
    if low == 0:
        cases.append({"type": "array", "maxItems": 0})
    for count in range(max(1, low), length + 1) if length < 3 else (length,):
        for chosen in itertools.permutations(range(len(choices)), count - 1):
            left = [choice for index, choice in enumerate(choices) if index not in chosen]
            prefix = [choices[index] for index in chosen]
            # From three on one case holds the shorter ones too: fewer of the chosen, then the end.
            least = max(low, min(count - 1, 1)) if length >= 3 else count
            last = {"enum": [one["const"] for one in left]} if "const" in left[0] else any_of(left)
            case = {"type": "array", "prefixItems": [*prefix, last], "items": False}
            cases.append({**case, "minItems": least, "maxItems": count})
    return any_of(cases)

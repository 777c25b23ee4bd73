"""Arrays: `contains`, `uniqueItems` and `unevaluatedItems` as unions of what can be written."""

from __future__ import annotations

import itertools
import json
import math
import string
from typing import Any

from engine.text.schema.base import MAX_CASES, MAX_POSITION, Rewriter
from engine.text.schema.disjoint import disjoint, resolved
from engine.text.schema.errors import Unwritable, cannot
from engine.text.schema.parts import TYPES, any_of, at, canonical, is_number, names_of

MAX_CONTAINED = 64  # entries that a `contains` may ask for
MAX_PLACES = 1_200  # of all cases of a `contains`
MAX_RANGE = 16  # integers between two bounds that are listed
MAX_FREE = 3  # items that are not listed and yet none of them twice: each is of a class of its own
# Strings of different classes begin otherwise; the last one is all that begin with none of the letters. Of two items
# one alone has cases of its own, so that the classes may be many.
_COARSE = ("aAbBcC", "dDeEfF", "gGhHiI", "jJkKlLmM", "nNoOpPqQ", "rRsStT", "uUvVwWxXyYzZ")
_FINE = tuple(letter + letter.upper() for letter in string.ascii_lowercase)
_BETWEEN = (None, 0, 1, 2, 3, 5, 10, 100, None)  # numbers of different classes


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
    most = MAX_FREE if high is None else min(high, MAX_FREE)
    classes = _classes(rewriter, items, _FINE if most == 2 else _COARSE, 0) if low <= most else []
    if len(classes) >= max(low, 2):
        # Shorter arrays than the client would take, but of those that it takes.
        return _permutations(classes, low, most, where)
    why = "can be kept where the items are listed by `enum`, or are strings or numbers and need not be more than three"
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


def _classes(rewriter: Rewriter, schema: Any, letters: tuple[str, ...], depth: int) -> list[dict[str, Any]]:
    """Parts of a schema's values that share none with each other; empty where there are none to be told."""
    if depth > 4:
        return []
    types = rewriter.types.types(schema)
    found: list[dict[str, Any]] = []
    if "string" in types:
        found += [{"type": "string", "pattern": f"^[{some}]"} for some in (*letters, "^a-zA-Z")]
    if types & {"integer", "number"}:
        kind = "number" if "number" in types else "integer"
        bounds = itertools.pairwise(_BETWEEN)
        found += [
            {"type": kind, **({} if low is None else {"minimum": low}), **({} if high is None else {bound: high})}
            for low, high in bounds
            for bound in ("exclusiveMaximum",)
        ]
    found += [{"type": kind} for kind in ("null", "array") if kind in types]
    found += [{"const": value} for value in (True, False)] if "boolean" in types else []
    if "object" in types:
        found += _classes_of_objects(rewriter, schema, letters, depth) or [{"type": "object"}]
    return found


def _classes_of_objects(rewriter: Rewriter, schema: Any, letters: tuple[str, ...], depth: int) -> list[dict[str, Any]]:
    """By the value of a property that each of them has; empty where none of those has classes."""
    schema = resolved(rewriter, schema) if isinstance(schema, dict) else {}
    for name in names_of(schema.get("required")):
        inner = schema.get("properties", {}).get(name)
        values = None if inner is None else _listed(rewriter, inner)
        classes = [{"const": value} for value in values or ()] or _classes(rewriter, inner, letters, depth + 1)
        if len(classes) > 1:
            return [{"type": "object", "required": [name], "properties": {name: one}} for one in classes]
    return []


def _one_of(choices: list[dict[str, Any]]) -> Any:
    """Any of some consts or classes, in as few branches as they need."""
    values = [choice["const"] for choice in choices if "const" in choice]
    patterns = [choice["pattern"] for choice in choices if "pattern" in choice]
    rest = [choice for choice in choices if "const" not in choice and "pattern" not in choice]
    listed = [{"enum": values}] if values else []
    return any_of([*listed, *([{"type": "string", "pattern": "|".join(patterns)}] if patterns else []), *rest])


def _apart(rewriter: Rewriter, schemas: list[Any]) -> bool:
    return all(disjoint(rewriter, left, right, 0) for left, right in itertools.combinations(schemas, 2))


def _listed(rewriter: Rewriter, schema: Any, depth: int = 0) -> list[Any] | None:
    """All values of a schema, where they are few and listed; None else."""
    values = rewriter.types.values(schema)
    kinds = rewriter.types.types(schema)
    if values is None and kinds <= {"boolean", "null"}:
        values = ([True, False] if "boolean" in kinds else []) + ([None] if "null" in kinds else [])
    if values is None and isinstance(schema, dict) and depth < 4:
        schema = resolved(rewriter, schema)
        low, high = schema.get("minimum"), schema.get("maximum")
        branches = schema.get("anyOf", schema.get("oneOf"))
        if kinds == {"integer"} and is_number(low) and is_number(high) and high - low < MAX_RANGE:
            values = list(range(math.ceil(low), math.floor(high) + 1))
        elif isinstance(branches, list):
            # What else the schema says still holds for each of them.
            parts = [_listed(rewriter, branch, depth + 1) for branch in branches]
            values = None if None in parts else [value for part in parts if part for value in part]
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
            case = {"type": "array", "prefixItems": [*prefix, _one_of(left)], "items": False}
            cases.append({**case, "minItems": least, "maxItems": count})
    return any_of(cases)

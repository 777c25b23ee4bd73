"""Numbers: bounds and lengths as large as the grammar library can hold them."""

from __future__ import annotations

import math
from typing import Any

from engine.text.schema.base import Rewriter
from engine.text.schema.errors import Unwritable
from engine.text.schema.parts import at
from engine.text.schema.plain import NUMBERS

# Beyond it the library writes no range. Bounds of 64 bits are common, and numbers that large are not.
MAX_NUMBER = 10**17
MIN_FRACTION = 1e-15
MAX_LENGTH = 1_000_000


def number_keywords(rewriter: Rewriter, schema: dict[str, Any], where: str) -> dict[str, Any]:
    """The bounds of numbers and of the length of strings; those far out narrowed to what can be held."""
    found: dict[str, Any] = {key: schema[key] for key in NUMBERS if key in schema}
    for key, bound in found.items():
        if not math.isfinite(bound):
            raise rewriter.invalid(f"has a `{key}` that is no number of JSON")
        if key == "multipleOf":
            continue
        upper = key in ("maximum", "exclusiveMaximum")
        if (bound < -MAX_NUMBER if upper else bound > MAX_NUMBER) and rewriter.may_be(schema, "number"):
            raise Unwritable(key, at(where, key), f"{bound:g} is farther out than numbers can be held")
        if abs(bound) > MAX_NUMBER:
            found[key] = MAX_NUMBER if upper else -MAX_NUMBER
        elif bound != 0 and abs(bound) < MIN_FRACTION:
            # Inward: up for what is least, down for what is most.
            found[key] = (0 if bound > 0 else -MIN_FRACTION) if upper else (MIN_FRACTION if bound > 0 else 0)
    for key in ("minLength", "maxLength"):
        if key in schema:
            found[key] = schema[key]
    if found.get("minLength", 0) > MAX_LENGTH:
        raise Unwritable("minLength", at(where, "minLength"), f"no string of more than {MAX_LENGTH} characters is held")
    if found.get("maxLength", 0) > MAX_LENGTH:
        found["maxLength"] = MAX_LENGTH
    return found


def kept_apart(written: Any) -> Any:
    """A written schema whose exclusive bounds the library holds to.

    Above a whole number, and less than one above it, it takes that number itself for one of those: there the bound
    becomes the next one inward, wherever in the schema the two stand, for the library brings them together.
    """
    bounds: dict[str, set[float]] = {}
    _collect(written, bounds)
    lows, highs = bounds.get("exclusiveMinimum", set()), bounds.get("exclusiveMaximum", set())
    most, least = highs | bounds.get("maximum", set()), lows | bounds.get("minimum", set())
    moved: dict[str, set[float]] = {
        "exclusiveMinimum": {low for low in lows if any(low < high < low + 1 for high in most)},
        "exclusiveMaximum": {high for high in highs if any(high - 1 < low < high for low in least)},
    }
    return _moved(written, moved) if any(moved.values()) else written


_VALUES = ("const", "enum")
# What is in them goes by names of the client's.
_MAPS = ("properties", "patternProperties", "$defs")


def _collect(node: Any, bounds: dict[str, set[float]]) -> None:
    if isinstance(node, dict):
        for key, value in node.items():
            if key in NUMBERS and isinstance(value, int | float) and not isinstance(value, bool):
                bounds.setdefault(key, set()).add(value)
            elif key in _MAPS and isinstance(value, dict):
                _collect(list(value.values()), bounds)
            elif key not in _VALUES:
                _collect(value, bounds)
    elif isinstance(node, list):
        for value in node:
            _collect(value, bounds)


def _moved(node: Any, moved: dict[str, set[float]]) -> Any:
    if isinstance(node, list):
        return [_moved(value, moved) for value in node]
    if not isinstance(node, dict):
        return node
    found: dict[str, Any] = {}
    for key, value in node.items():
        if key in _MAPS and isinstance(value, dict):
            found[key] = {name: _moved(inner, moved) for name, inner in value.items()}
        else:
            found[key] = value if key in _VALUES else _moved(value, moved)
    for key, other, sign, inner in (("exclusiveMinimum", "minimum", 1, max), ("exclusiveMaximum", "maximum", -1, min)):
        bound = found.get(key)
        if isinstance(bound, int | float) and bound in moved[key] and float(bound).is_integer():
            del found[key]
            step = max(MIN_FRACTION, 2 * math.ulp(float(bound)))
            found[other] = inner(found.get(other, bound), bound + sign * step)
    return found

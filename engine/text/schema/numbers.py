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

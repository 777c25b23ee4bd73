"""One schema object in the words of draft 2020-12, its values judged by their kinds."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from engine.text.schema.parts import TYPES

_COUNTS = (
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "minProperties",
    "maxProperties",
    "minContains",
    "maxContains",
)
NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")


_MAPS_OF_SCHEMAS = ("properties", "patternProperties", "dependentSchemas")
# The kinds of value that keywords must have, and what they are called.
_SCHEMA = ((dict, bool), "schema: an object, true or false")
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    **dict.fromkeys((*_MAPS_OF_SCHEMAS, "$defs", "definitions", "dependentRequired"), ((dict,), "object")),
    **dict.fromkeys(("additionalProperties", "contains", "propertyNames", "not", "if", "then", "else"), _SCHEMA),
    **dict.fromkeys(("unevaluatedProperties", "unevaluatedItems", "additionalItems"), _SCHEMA),
    "items": ((dict, bool, list), "schema, and no list of schemas"),
    "pattern": ((str,), "string"),
    "uniqueItems": ((bool,), "true or false"),
    "type": ((str, list), "name of a type, and no list of them"),
}


_VALUES = ("const", "default", "example")


def plain(schema: dict[str, Any], invalid: Callable[[str], Exception]) -> dict[str, Any]:
    """The schema with the older drafts' words in those of 2020-12, and without what constrains nothing."""
    # A null is a keyword that a program has left out, but where it is a value.
    found = {key: value for key, value in schema.items() if value is not None or key in _VALUES}
    for key, (kinds, words) in _KINDS.items():
        if key in found and not isinstance(found[key], kinds):
            raise invalid(f"has a `{key}` that is no {words}")
    for key in _MAPS_OF_SCHEMAS:
        for name, inner in found.get(key, {}).items():
            if not isinstance(inner, dict | bool | list) or (isinstance(inner, list) and key != "dependencies"):
                raise invalid(f"has `{key}` with no schema for {name[:40]!r}")
    for key in _COUNTS:
        value = found.get(key)
        if isinstance(value, float) and value.is_integer():
            found[key] = value = int(value)
        if key in found and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise invalid(f"has a `{key}` that is no whole number from 0 on")
    for key in NUMBERS:
        value = found.get(key)
        if key in found and not (isinstance(value, int | float) or (isinstance(value, bool) and key.startswith("ex"))):
            raise invalid(f"has a `{key}` that is no number")
    for key, bound in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if isinstance(found.get(key), bool) and found.pop(key) and bound in found:
            found[key] = found.pop(bound)
    for key in ("allOf", "anyOf", "oneOf", "prefixItems"):
        if key in found and not isinstance(found[key], list):
            raise invalid(f"has an `{key}` that is no list of schemas")
    if isinstance(found.get("items"), list):
        found["prefixItems"] = found.pop("items")
        if "additionalItems" in found:
            found["items"] = found["additionalItems"]
    found.pop("additionalItems", None)
    if isinstance(dependencies := found.pop("dependencies", None), dict):
        for name, inner in dependencies.items():
            key = "dependentRequired" if isinstance(inner, list | str) else "dependentSchemas"
            inner = [inner] if isinstance(inner, str) else inner
            found[key] = {**found.get(key, {}), name: inner}
    for key in ("dependentRequired", "dependentSchemas"):
        if not isinstance(found.get(key, {}), dict):
            raise invalid(f"has `{key}` that are no object")
    if "required" in found:
        if isinstance(found["required"], bool):
            # Draft 3 said it inside of the property.
            raise invalid("has a `required` that is no list of names")
        if not isinstance(found["required"], list) or not all(isinstance(name, str) for name in found["required"]):
            raise invalid("has a `required` that is no list of names")
    if "enum" in found and (not isinstance(found["enum"], list) or not found["enum"]):
        raise invalid("has an `enum` that lists nothing")
    kinds = found.get("type", [])
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if kind not in (*TYPES, "integer"):
            raise invalid(f"has the `type` {json.dumps(kind)[:40]}, which is none of JSON's")
    return found

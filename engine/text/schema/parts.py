"""The small pieces of a schema that is being written: joining, places in it, types and equality of values.

Pure functions over plain JSON; nothing here knows of a client's schema as a whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, TypeGuard

from engine.config import shortened

TYPES = ("null", "boolean", "number", "string", "array", "object")


def at(where: str, key: str) -> str:
    key = shortened(key)
    return f"{where}.{key}" if where else key


def names_of(value: Any) -> list[str]:
    return [name for name in value if isinstance(name, str)] if isinstance(value, list) else []


def absent(name: str) -> dict[str, Any]:
    return {"properties": {name: False}}


def item_at(place: int, inner: Any) -> Any:
    if inner is False:
        return False
    return {"type": "array", "prefixItems": [*[True] * place, inner], "minItems": place + 1}


def all_of(parts: Iterable[Any]) -> Any:
    kept = [part for part in parts if part is not True and part != {}]
    if any(part is False for part in kept):
        return False
    if len(kept) < 2:
        return kept[0] if kept else True
    types = set(TYPES)
    for part in kept:
        types &= told_types(part)
    return {"allOf": kept} if types else False


def told_types(schema: Any) -> set[str]:
    """The types that a schema in the library's keywords can be of, seen without following references."""
    if schema is False:
        return set()
    found = set(TYPES)
    if not isinstance(schema, dict):
        return found
    if "type" in schema:
        found &= wide([schema["type"]] if isinstance(schema["type"], str) else schema["type"])
    if "const" in schema:
        found &= {type_of(schema["const"])}
    elif "enum" in schema:
        found &= set(map(type_of, schema["enum"]))
    if "anyOf" in schema:
        found &= set[str]().union(*map(told_types, schema["anyOf"]))
    for part in schema.get("allOf", ()):
        found &= told_types(part)
    return found


def any_of(parts: Iterable[Any]) -> Any:
    kept = [part for part in parts if part is not False]
    if any(part is True or part == {} for part in kept):
        return True
    if len(kept) < 2:
        return kept[0] if kept else False
    return {"anyOf": kept}


def type_of(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "number"
    if isinstance(value, str):
        return "string"
    return "array" if isinstance(value, list) else "object"


def wide(types: Iterable[str]) -> set[str]:
    return {"number" if name == "integer" else name for name in types}


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def canonical(value: Any) -> str:
    """Equal for values that JSON Schema holds equal: 1 is 1.0."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, sort_keys=True)

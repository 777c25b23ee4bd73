"""Whose fault it is that a schema cannot be used: the keyword, its place, and why in words that name no library.

The library says what is wrong with what it was given, which is not what the client wrote. So parts of the client's
schema are left out, one at a time, until it can be used.
"""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Callable
from typing import Any

from engine.text.schema.references import children

MAX_TRIES = 80
MAX_SECONDS = 1.0
NO_VALUE = "no value satisfies it"
_TOO_LARGE = "it is too large or too complex"
# What the library says, and what it means.
_MEANINGS: list[tuple[str, str]] = [
    (r"unable to determine if regex is empty", "its pattern and its bounds are too complex together; make one simpler"),
    (r"^no value|unsatisfiable|no text satisfies|regex is empty(?!:? unknown)", NO_VALUE),
    (r"not a unicode scalar", "its pattern names half of a surrogate pair, which is no character"),
    (r"lookaround|look-around", "its pattern looks ahead, behind, at a border or for the begin of a text within it"),
    (r"exceeds? the maximum number of nested", "its pattern is nested too deep"),
    (r"backreference", "its pattern refers back to a group"),
    (r"regex (parse )?error|invalid regex|unicode property|escape", "its pattern is none that a grammar can follow"),
    (r"not disjoint", "one name may match two of its patterns, and they are too complex to be told apart"),
    (r"min/maxproperties", "free names beside optional ones cannot be counted"),
    (r"too many digits", "its number has too many digits"),
    (r"too (large|big|complex|many)|limit|fuel|lexer|states", _TOO_LARGE),
]


def meaning(fault: str) -> str:
    """Why a grammar cannot be used, from what the library says."""
    lowered = fault.lower()
    return next((words for found, words in _MEANINGS if re.search(found, lowered)), "it is beyond what a grammar holds")


def blame(schema: Any, fault: str, fails: Callable[[Any], str | None]) -> str:
    """The end of a sentence about a schema that cannot be used. fails: the fault of a schema, None for one without."""
    why = meaning(fault)
    found = _Search(schema, fails, why).run()
    if found is None:
        return f"cannot be used: {why}"
    keyword, place = found
    if why == NO_VALUE:
        return f"cannot be used: no value satisfies it, by `{keyword}` at `{place}`"
    return f"has `{keyword}` at `{place}`, which cannot be kept in full: {why}"


class _Search:
    def __init__(self, schema: Any, fails: Callable[[Any], str | None], why: str) -> None:
        self._root = copy.deepcopy(schema)
        self._fails = fails
        self._why = why
        self._left = MAX_TRIES
        self._until = time.monotonic() + MAX_SECONDS
        self._seen: set[int] = set()

    def run(self) -> tuple[str, str] | None:
        return self._within(self._root, "") if isinstance(self._root, dict) else None

    def _within(self, schema: dict[str, Any], where: str) -> tuple[str, str] | None:
        """The keyword without which the whole schema can be used, as deep as it can be found."""
        if id(schema) in self._seen:
            return None
        self._seen.add(id(schema))
        keys = [key for key in schema if key not in ("$defs", "definitions", "$schema", "$id", "title", "description")]
        # `type` last: without it much else says nothing.
        for key in sorted(keys, key=lambda key: (key == "type", key == "required")):
            value = schema.pop(key)
            heals = self._heals()
            schema[key] = value
            if heals:
                place = f"{where}.{key}" if where else key
                return self._deeper(schema, key, place) or (key, place)
        return None

    def _deeper(self, schema: dict[str, Any], key: str, place: str) -> tuple[str, str] | None:
        if key == "$ref":
            path = schema[key].removeprefix("#/") if isinstance(schema[key], str) else ""
            target = self._root
            for name in path.split("/"):
                target = target.get(name) if isinstance(target, dict) else None
            return self._within(target, path.replace("/", ".")) if isinstance(target, dict) else None
        parts = [(path.partition("/")[2], child) for path, child in children({key: schema[key]})]
        parts = [(name, child) for name, child in parts if isinstance(child, dict)]
        for name, child in parts:
            kept = dict(child)
            child.clear()
            heals = self._heals()
            child.update(kept)
            if heals:
                return self._within(child, _inside(schema, key, place, name))
        if isinstance(schema[key], dict) and len(parts) > 1:
            # Several are at fault: one of them alone then.
            whole = schema[key]
            for name, child in parts:
                schema[key] = {name: child}
                if not self._heals() and self._left >= 0:
                    inside = _inside(schema, key, place, name)
                    return self._within(child, inside) or (key, inside)
            schema[key] = whole
        return None

    def _heals(self) -> bool:
        self._left -= 1
        if self._left < 0 or time.monotonic() > self._until:
            return False
        return self._fails(self._root) is None


def _inside(schema: dict[str, Any], key: str, place: str, name: str) -> str:
    if not name:
        return place
    return f"{place}[{name}]" if isinstance(schema[key], list) else f"{place}.{name}"

"""`unevaluatedProperties` and `unevaluatedItems`: what other keywords have looked at, case by case.

Which names and items are looked at depends on which branches hold. Each way is a case of its own: the condition, and
what is looked at when it holds. Fewer may be told than are, which only narrows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engine.text.schema.base import MAX_CASES, Rewriter
from engine.text.schema.errors import Unwritable
from engine.text.schema.parts import absent, all_of, any_of, at
from engine.text.schema.plain import plain
from engine.text.schema.strings import NO_STRING, readable_patterns

MAX_DEPTH = 12


@dataclass(frozen=True, slots=True)
class _Seen:
    """names, patterns: the properties that are looked at; None for all. length: the first items; None for all."""

    names: frozenset[str] | None = frozenset()
    patterns: frozenset[str] = frozenset()
    length: int | None = 0

    def __or__(self, other: _Seen) -> _Seen:
        names = None if self.names is None or other.names is None else self.names | other.names
        length = None if self.length is None or other.length is None else max(self.length, other.length)
        return _Seen(names, self.patterns | other.patterns, length)


_Case = tuple[Any, _Seen]
_NOTHING: list[_Case] = [(True, _Seen())]


def unevaluated_properties(rewriter: Rewriter, schema: dict[str, Any], where: str) -> Any:
    rest, here = schema["unevaluatedProperties"], at(where, "unevaluatedProperties")
    if rest is True or rest == {} or "additionalProperties" in schema or not rewriter.may_be(schema, "object"):
        return True
    written = rewriter.yes(rest, here)
    cases: list[Any] = []
    for condition, seen in _Cases(rewriter, "unevaluatedProperties", here).of(schema):
        if seen.names is None:
            cases.append(condition)
            continue
        closed: dict[str, Any] = {
            "properties": dict.fromkeys(sorted(seen.names), True),
            "additionalProperties": written,
        }
        patterns = [readable_patterns(rewriter, one, here, "unevaluatedProperties") for one in sorted(seen.patterns)]
        if patterns:
            single = (one[0] if len(one) == 1 else rewriter.languages.pattern(one) or NO_STRING for one in patterns)
            closed["patternProperties"] = dict.fromkeys(single, True)
        cases.append(all_of([condition, closed]))
    return any_of(cases)


def unevaluated_items(rewriter: Rewriter, schema: dict[str, Any], where: str) -> Any:
    rest, here = schema["unevaluatedItems"], at(where, "unevaluatedItems")
    if rest is True or rest == {} or "items" in schema or not rewriter.may_be(schema, "array"):
        return True
    written = rewriter.yes(rest, here)
    cases: list[Any] = []
    for condition, seen in _Cases(rewriter, "unevaluatedItems", here).of(schema):
        tail = True if seen.length is None else {"prefixItems": [True] * seen.length, "items": written}
        cases.append(all_of([condition, tail]))
    return any_of(cases)


class _Cases:
    """Of one keyword at one place. Raises Unwritable for more of them than can be written."""

    def __init__(self, rewriter: Rewriter, keyword: str, here: str) -> None:
        self._rewriter = rewriter
        self._keyword = keyword
        self._here = here

    def of(self, schema: dict[str, Any]) -> list[_Case]:
        """The cases of a schema that has the keyword."""
        return self._cases({key: value for key, value in schema.items() if key != self._keyword}, 0)

    def _cases(self, schema: Any, depth: int) -> list[_Case]:
        if not isinstance(schema, dict):
            return _NOTHING
        if depth > MAX_DEPTH:
            raise Unwritable(self._keyword, self._here, "stands beside conditions that are nested too deep")
        rewriter = self._rewriter
        schema = plain(schema, rewriter.invalid)
        everything = "additionalProperties" in schema or "unevaluatedProperties" in schema
        found: list[_Case] = [
            (
                True,
                _Seen(
                    None if everything else frozenset(schema.get("properties", {})),
                    frozenset(schema.get("patternProperties", {})),
                    None if "items" in schema or "unevaluatedItems" in schema else len(schema.get("prefixItems", ())),
                ),
            )
        ]
        for key in ("$ref", "$dynamicRef", "$recursiveRef"):
            if key in schema:
                target = rewriter.references.target(schema[key], schema, self._here, key)
                found = self._both(found, self._cases(target, depth + 1))
        for part in schema.get("allOf", ()):
            found = self._both(found, self._cases(part, depth + 1))
        for key in ("anyOf", "oneOf"):
            if key in schema:
                found = self._both(found, self._branches(schema[key], depth))
        if "if" in schema:
            found = self._both(found, self._conditional(schema, depth))
        for name, inner in schema.get("dependentSchemas", {}).items():
            there = self._both(
                [({"required": [name], "properties": {name: True}}, _Seen())], self._cases(inner, depth + 1)
            )
            found = self._both(found, [(absent(name), _Seen()), *there])
        return found

    def _branches(self, branches: list[Any], depth: int) -> list[_Case]:
        found: list[_Case] = []
        for branch in branches:
            inner = self._cases(branch, depth + 1)
            try:
                found += self._both([(self._rewriter.yes(branch, self._here), _Seen())], inner)
            except Unwritable as error:
                self._rewriter.dropped = error
        if all(seen == _Seen() for _, seen in found):
            return _NOTHING
        return found

    def _conditional(self, schema: dict[str, Any], depth: int) -> list[_Case]:
        seen = self._cases(schema["if"], depth + 1)
        met = self._both(seen, self._cases(schema.get("then", True), depth + 1))
        unmet = self._cases(schema.get("else", True), depth + 1)
        found: list[_Case] = []
        for write, cases in ((self._rewriter.yes, met), (self._rewriter.no, unmet)):
            try:
                found += self._both([(write(schema["if"], self._here), _Seen())], cases)
            except Unwritable as error:
                self._rewriter.dropped = error
        return found or _NOTHING

    def _both(self, left: list[_Case], right: list[_Case]) -> list[_Case]:
        if len(left) * len(right) > MAX_CASES:
            raise Unwritable(self._keyword, self._here, "stands beside too many conditions")
        found: list[_Case] = []
        for mine, seen in left:
            for other, more in right:
                condition = all_of([mine, other])
                if condition is not False:
                    found.append((condition, seen | more))
        return found

"""Writes a JSON schema anew in the keywords that the grammar library knows: the same values, or some of them.

`not`, `if`, `oneOf`, `contains`, dependencies and the like become unions of what is known. Every rewriting only ever
narrows: what it admits, the client's schema admits. What cannot be written is refused by its keyword and place, or,
where the client does not insist, left out with a warning.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

from engine.text.schema import arrays, combining, negation, objects, strings, unevaluated
from engine.text.schema.base import FORMATS, MAX_NEGATED_DEPTH, MAX_WRITTEN, Rewriter
from engine.text.schema.errors import Unwritable
from engine.text.schema.names import name_keywords, with_listed_names
from engine.text.schema.numbers import kept_apart, number_keywords
from engine.text.schema.parts import absent, all_of, any_of, at, names_of
from engine.text.schema.plain import plain


class SchemaRewriter(Rewriter):
    """One schema, once. expand: whether keywords that the library lacks are rewritten, or only left out."""

    def __init__(
        self, root: Any, *, strict: bool, invalid: Callable[[str], Exception], warnings: list[str], expand: bool = True
    ) -> None:
        # A copy: references are written anew in it, as pointers from the root.
        self._root = root = copy.deepcopy(root)
        self._warnings = warnings
        self._names: dict[int, str] = {}
        self._defs: dict[str, Any] = {}
        self._place = ""

        def invalid_here(what: str) -> Exception:
            return invalid(f"{what} (at `{self._place}`)" if self._place else what)

        super().__init__(root, strict, expand, invalid_here)
        self._given_invalid = invalid

    def write(self) -> Any:
        """The schema in the library's keywords, with the targets of all references under `$defs`."""
        found = self.yes(self._root, "")
        if found is False and self.dropped is not None:
            if self.strict or not self.expand:
                raise self.dropped
            self.warn(self.dropped)
            return SchemaRewriter(
                self._root, strict=False, invalid=self._given_invalid, warnings=self._warnings, expand=False
            ).write()
        if self._defs:
            found = {"$defs": self._defs, **(found if isinstance(found, dict) else {"allOf": [found]})}
        return kept_apart(found)

    def _refer(self, target: Any, where: str) -> Any:
        if not isinstance(target, dict):
            return self.yes(target, where)
        name = self._names.get(id(target))
        if name is None:
            name = self._names[id(target)] = f"r{len(self._names)}"
            self._defs[name] = True
            try:
                self._defs[name] = self.yes(target, where)
            except Unwritable:
                # What was written meanwhile may refer to it, and goes with it.
                for key in list(self._names)[list(self._names).index(id(target)) :]:
                    self._defs.pop(self._names[key], None)
                    self._names[key] = ""
                raise
        elif not name:
            raise Unwritable("$ref", where, "leads to what cannot be kept in full")
        return {"$ref": f"#/$defs/{name}"}

    def yes(self, schema: Any, where: str) -> Any:
        if isinstance(schema, bool):
            return schema
        self._place = where
        if not isinstance(schema, dict):
            raise self.invalid(f"holds {json.dumps(schema)[:40]} where a schema must stand")
        self.written += 1
        if self.written > MAX_WRITTEN:
            raise self.invalid("grows too large when its `not`, `oneOf` and the like are written out")
        schema = with_listed_names(self, plain(schema, self.invalid), where)
        own = self._own(schema, where)
        parts: list[Any] = []
        for keyword, write in self._writers(schema, where):
            try:
                if not self.expand and keyword not in ("allOf", "anyOf", "$ref", "oneOf"):
                    raise Unwritable(keyword, at(where, keyword), "is left to the model")
                part = write()
            except Unwritable as error:
                if self.strict:
                    raise
                self.warn(error)
                continue
            parts.append(part)
        return all_of([own, *parts])

    def warn(self, error: Unwritable) -> None:
        text = f"`{error.keyword}` at `{error.where}` is not enforced"
        if len(self._warnings) < 20 and text not in self._warnings:
            self._warnings.append(text)

    def _own(self, schema: dict[str, Any], where: str) -> Any:
        """The keywords that the library knows, their schemas written."""
        found: dict[str, Any] = {}
        for key in ("type", "const", "enum", "minItems", "maxItems", "required"):
            if key in schema:
                found[key] = schema[key]
        try:
            found |= number_keywords(self, schema, where)
        except Unwritable as error:
            if self.strict:
                raise
            self.warn(error)
        for key in ("description", "title"):
            found.pop(key, None)
        if isinstance(schema.get("format"), str) and schema["format"] in FORMATS:
            found["format"] = schema["format"]
        more: list[Any] = []
        if "pattern" in schema:
            patterns = strings.readable_patterns(self, schema["pattern"], at(where, "pattern"), "pattern")
            if patterns:
                found["pattern"] = patterns[0]
            more += [{"pattern": pattern} for pattern in patterns[1:]]
        if "properties" in schema:
            if not isinstance(schema["properties"], dict):
                raise self.invalid("has `properties` that are no object")
            found["properties"] = {
                name: self.yes(part, at(where, f"properties.{name}")) for name, part in schema["properties"].items()
            }
        named = name_keywords(self, schema, where)
        if "properties" in named:
            named["properties"] = {**found.get("properties", {}), **named["properties"]}
        found |= named
        if "prefixItems" in schema:
            found["prefixItems"] = [
                self.yes(part, at(where, f"prefixItems[{index}]")) for index, part in enumerate(schema["prefixItems"])
            ]
        if "items" in schema:
            found["items"] = self.yes(schema["items"], at(where, "items"))
        found |= objects.property_counts(self, schema, where)
        return all_of([found or True, *more])

    def _writers(self, schema: dict[str, Any], where: str) -> Iterator[tuple[str, Callable[..., Any]]]:
        """The keywords of a schema that are parts of their own, each with what writes it."""
        for key in ("$ref", "$dynamicRef", "$recursiveRef"):
            if key in schema:
                yield (
                    key,
                    lambda key=key: self._refer(
                        self.references.target(schema[key], schema, at(where, key), key), at(where, key)
                    ),
                )
        if "allOf" in schema:
            yield (
                "allOf",
                lambda: all_of(
                    [self.yes(part, at(where, f"allOf[{index}]")) for index, part in enumerate(schema["allOf"])]
                ),
            )
        if "anyOf" in schema:
            yield "anyOf", lambda: combining.some(self, schema["anyOf"], where, "anyOf")
        if "oneOf" in schema:
            yield "oneOf", lambda: combining.one_of(self, schema["oneOf"], where)
        if "not" in schema:
            yield "not", lambda: combining.solid(self, "not", where, self.no(schema["not"], at(where, "not")))
        if "if" in schema and ("then" in schema or "else" in schema):
            yield "if", lambda: combining.conditional(self, schema, where)
        for name, names in schema.get("dependentRequired", {}).items():
            yield (
                "dependentRequired",
                lambda name=name, names=names: any_of([absent(name), {"required": [name, *names_of(names)]}]),
            )
        for name, inner in schema.get("dependentSchemas", {}).items():
            yield (
                "dependentSchemas",
                lambda name=name, inner=inner: any_of(
                    [
                        absent(name),
                        all_of(
                            [
                                {"properties": {name: True}, "required": [name]},
                                self.yes(inner, at(where, f"dependentSchemas.{name}")),
                            ]
                        ),
                    ]
                ),
            )
        if "contains" in schema:
            yield "contains", lambda: arrays.contains(self, schema, where)
        if schema.get("uniqueItems") is True:
            yield "uniqueItems", lambda: arrays.unique_items(self, schema, where)
        if "propertyNames" in schema:
            yield "propertyNames", lambda: objects.property_names(self, schema, where)
        if "unevaluatedProperties" in schema:
            yield "unevaluatedProperties", lambda: unevaluated.unevaluated_properties(self, schema, where)
        if "unevaluatedItems" in schema:
            yield "unevaluatedItems", lambda: unevaluated.unevaluated_items(self, schema, where)
        if "maxProperties" in schema and (schema.get("properties") or "propertyNames" in schema):
            yield "maxProperties", lambda: objects.max_properties(self, schema, where)
        if schema.get("minProperties", 0) and (schema.get("properties") or "propertyNames" in schema):
            yield "minProperties", lambda: objects.min_properties(self, schema, where)

    def no(self, schema: Any, where: str) -> Any:
        """Values that a schema does not admit; perhaps not all of them. Raises Unwritable where none can be told."""
        if isinstance(schema, bool):
            return not schema
        if not isinstance(schema, dict):
            raise self.invalid(f"holds {json.dumps(schema)[:40]} where a schema must stand")
        self.written += 1
        if self.written > MAX_WRITTEN:
            raise Unwritable("not", where, "grows too large")
        if self.negated >= MAX_NEGATED_DEPTH:
            raise Unwritable("not", where, "is nested too deep, or leads back to itself")
        self.negated += 1
        try:
            told = plain(schema, self.invalid)
            cases: list[Any] = []
            failed: Unwritable | None = None
            for write in negation.negations(self, told, where):
                try:
                    cases.append(write())
                except Unwritable as error:
                    failed = self.dropped = error
            found = any_of(cases)
            if found is False and failed is not None:
                raise failed
            return found
        finally:
            self.negated -= 1

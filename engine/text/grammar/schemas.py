"""JSON schemas on their way to the grammar library: bounded, rewritten, and thinned where it still refuses one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import unquote

from engine.request import RequestError
from engine.text.grammar.spec import MAX_DEPTH, MAX_SCHEMAS, MAX_SPEC_CHARACTERS, GrammarSpec, spec_error
from engine.text.schema.errors import Unwritable
from engine.text.schema.rewriter import SchemaRewriter

MAX_REFERENCE_DEPTH = 400
# Patterns that one string must match all at once: the library's check of whether any string does is exponential in
# them (3 ms for 12, 6 s for 20), and nothing stops it.
MAX_JOINED_PATTERNS = 10
# Unbounded whitespace is how a hot model writes blanks until max_tokens; 40 is enough to indent ten levels by four.
_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,40}"
# Where a schema holds schemas. Everything else is data (enum, const, examples) or a value.
_SCHEMA_MAPS = frozenset(["properties", "patternProperties", "$defs", "definitions", "dependentSchemas"])
_SCHEMA_LISTS = frozenset(["allOf", "anyOf", "oneOf", "prefixItems"])
_SCHEMAS = frozenset(
    ["additionalProperties", "additionalItems", "items", "not", "if", "then", "else", "contains", "propertyNames",
     "unevaluatedProperties", "unevaluatedItems", "contentSchema"]
)  # fmt: skip


class NoValueError(Exception):
    """A schema that is well-formed and that no value satisfies."""


def schema_error(spec: GrammarSpec, where: str, what: str) -> RequestError:
    """The error about one schema of a spec, from its sentence's end."""
    if where.startswith("of `"):
        # Tools were sent, and no tag.
        return RequestError(f"The schema {where}{what}.", param=spec.param)
    return spec_error(spec, f"{where}{what}")


def checked(
    spec: GrammarSpec, schema: Any, warnings: list[str], *, strict: bool, expand: bool = True, where: str = ""
) -> Any:
    """The schema as the library takes it. Raises RequestError for one that is too deep, too large or remote,
    NoValueError for one that admits nothing.

    where: what the sentences call it, where a spec holds several.
    """

    def invalid(what: str) -> RequestError:
        return schema_error(spec, where, what)

    if not isinstance(schema, dict | bool):
        raise invalid("must be a JSON schema: an object")
    _bound(schema, invalid)
    try:
        written = SchemaRewriter(schema, strict=strict, invalid=invalid, warnings=warnings, expand=expand).write()
    except Unwritable as error:
        sentence = f"has `{error.keyword}` at `{error.where or 'its top'}`, which cannot be kept in full: {error.why}"
        raise invalid(sentence) from None
    except RecursionError:
        raise invalid(f"follows references more than {MAX_REFERENCE_DEPTH} schemas deep") from None
    except (TypeError, AttributeError):
        # A keyword's value of another kind than the standard has it: the walk finds no list, or no number.
        raise invalid("has a keyword whose value is not of the kind that JSON Schema asks for") from None
    if written is False:
        raise NoValueError
    if written is True:
        written = {}
    if len(json.dumps(written)) > 4 * MAX_SPEC_CHARACTERS:
        raise invalid("grows too large when its `not`, `oneOf` and the like are written out")
    try:
        joined = _Joined(written).count(written)
    except RecursionError:
        raise invalid(f"follows references more than {MAX_REFERENCE_DEPTH} schemas deep") from None
    if joined > MAX_JOINED_PATTERNS:
        raise invalid(f"joins more than {MAX_JOINED_PATTERNS} patterns in one place")
    options: dict[str, Any] = {"lenient": not strict, "whitespace_flexible": spec.any_whitespace}
    if spec.any_whitespace:
        options["whitespace_pattern"] = spec.whitespace_pattern or _WHITESPACE
    return {"x-guidance": options, **written}


def _bound(schema: Any, invalid: Callable[[str], RequestError]) -> None:
    """Raises for a schema that is nested too deep, or holds too many."""
    level, count = [schema], 0
    for _ in range(MAX_DEPTH + 1):
        count += len(level)
        if count > MAX_SCHEMAS:
            raise invalid(f"holds more than {MAX_SCHEMAS} schemas")
        level = [
            inner
            for outer in level
            if isinstance(outer, dict)
            for inner in _children(outer, (*_SCHEMA_MAPS, *_SCHEMA_LISTS, *_SCHEMAS, "items"))
        ]
        if not level:
            return
    raise invalid(f"is nested more than {MAX_DEPTH} schemas deep")


class _Joined:
    """How many patterns may have to hold for one string, from above: members of allOf and targets of $ref add up."""

    def __init__(self, root: dict[str, Any]) -> None:
        self._root = root
        self._known: dict[int, int] = {}
        self._depth = 0

    def count(self, schema: Any) -> int:
        if not isinstance(schema, dict):
            return 0
        known = self._known.get(id(schema))
        if known is not None:
            return known
        if self._depth == MAX_REFERENCE_DEPTH:
            raise RecursionError
        self._known[id(schema)] = 0  # a cycle adds nothing
        self._depth += 1
        total = sum(key in schema for key in ("pattern", "format"))
        total += sum(map(self.count, _children(schema, ("allOf",))))
        if "$ref" in schema:
            total += self.count(point(self._root, schema["$ref"]))
        for keys in (("anyOf", "oneOf"), (*_SCHEMA_MAPS - {"$defs", "definitions"}, *_SCHEMAS, "prefixItems")):
            total += max(map(self.count, _children(schema, keys)), default=0)
        self._known[id(schema)] = total
        self._depth -= 1
        return total


def point(root: Any, reference: Any) -> Any:
    """What a JSON pointer (RFC 6901) names; None where it names nothing, which the library reports."""
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    found = root
    for part in unquote(reference[1:]).split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict):
            found = found.get(part)
        elif isinstance(found, list) and part.isdecimal() and int(part) < len(found):
            found = found[int(part)]
        else:
            return None
    return found


def _children(schema: dict[str, Any], keys: Iterable[str]) -> list[Any]:
    """The schemas under some keywords."""
    found: list[Any] = []
    for key in keys:
        value = schema.get(key)
        if isinstance(value, list):
            found += value
        elif isinstance(value, dict):
            found += value.values() if key in _SCHEMA_MAPS else [value]
    return found


def patterns(schema: Any) -> set[str]:
    """Every pattern that stands in a schema, of values and of names."""
    found: set[str] = set()
    if isinstance(schema, dict):
        if isinstance(schema.get("pattern"), str):
            found.add(schema["pattern"])
        if isinstance(schema.get("patternProperties"), dict):
            found.update(schema["patternProperties"])
        for inner in _children(schema, (*_SCHEMA_MAPS, *_SCHEMA_LISTS, *_SCHEMAS, "items")):
            found |= patterns(inner)
    return found


def without_patterns(schema: Any, bad: set[str]) -> Any:
    """A schema without some patterns, the others still held."""
    if isinstance(schema, list):
        return [without_patterns(inner, bad) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: value for key, value in schema.items() if not (key == "pattern" and value in bad)}
    for key, value in kept.items():
        if key == "patternProperties":
            kept[key] = {name: without_patterns(inner, bad) for name, inner in value.items() if name not in bad}
        elif key in _SCHEMA_MAPS and isinstance(value, dict):
            kept[key] = {name: without_patterns(inner, bad) for name, inner in value.items()}
        elif key in _SCHEMAS or key in _SCHEMA_LISTS:
            kept[key] = without_patterns(value, bad)
    return kept


def without(schema: Any, keywords: frozenset[str]) -> Any:
    """A schema without some keywords, wherever schemas stand in it."""
    if not isinstance(schema, dict):
        return schema
    kept: dict[str, Any] = {}
    for key, value in schema.items():
        if key in keywords:
            continue
        if key in _SCHEMA_MAPS and isinstance(value, dict):
            kept[key] = {name: without(inner, keywords) for name, inner in value.items()}
        elif isinstance(value, list) and (key in _SCHEMA_LISTS or key == "items"):
            kept[key] = [without(inner, keywords) for inner in value]
        else:
            kept[key] = without(value, keywords) if key in _SCHEMAS else value
    return kept

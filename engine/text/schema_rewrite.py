"""Writes a JSON schema anew in the keywords that the grammar library knows: the same values, or some of them.

`not`, `if`, `oneOf`, `contains`, dependencies and the like become unions of what is known. Every rewriting only ever
narrows: what it admits, the client's schema admits. What cannot be written is refused by its keyword and place, or,
where the client does not insist, left out with a warning.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeGuard
from urllib.parse import quote, unquote, urldefrag, urljoin

from engine.text.schema_types import SchemaTypes

MAX_WRITTEN = 6_000  # schemas that one schema may grow to
MAX_CASES = 200  # branches of one union that a rewriting makes
MAX_NEGATED_DEPTH = 24
MAX_POSITION = 6  # how far into an array a `contains` may come to be fulfilled
TYPES = ("null", "boolean", "number", "string", "array", "object")
FORMATS = frozenset(
    ["date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "unknown"]
)
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_SINGLE = (
    "additionalProperties", "additionalItems", "items", "not", "if", "then", "else", "contains", "propertyNames",
    "unevaluatedProperties", "unevaluatedItems",
)  # fmt: skip
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
_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_IN_PLACE = (
    "$ref",
    "$dynamicRef",
    "$recursiveRef",
    "allOf",
    "anyOf",
    "oneOf",
    "if",
    "dependentSchemas",
    "dependencies",
)
_TYPE_OF = {
    **dict.fromkeys(("minLength", "maxLength", "pattern", "format"), "string"),
    **dict.fromkeys(_NUMBERS, "number"),
    **dict.fromkeys(("minItems", "maxItems", "items", "prefixItems", "contains", "uniqueItems"), "array"),
}
_LOOKS = re.compile(r"\(\?(?:[=!]|<[=!])|\\[1-9bBk]")


class Unwritable(Exception):
    """A keyword that cannot be written in what the library knows; `keyword`, `where` and a reason for the sentence."""

    def __init__(self, keyword: str, where: str, why: str) -> None:
        super().__init__(f"{keyword} at {where}: {why}")
        self.keyword, self.where, self.why = keyword, where, why


class SchemaRewriter:
    """One schema, once. invalid: makes the error for what is no schema at all, from a sentence's end.

    expand: whether keywords that the library lacks are rewritten, or only left out.
    """

    def __init__(
        self, root: Any, *, strict: bool, invalid: Callable[[str], Exception], warnings: list[str], expand: bool = True
    ) -> None:
        # A copy: references are written anew in it, as pointers from the root.
        self._root = root = copy.deepcopy(root)
        self._strict = strict
        self._invalid = invalid
        self._warnings = warnings
        self._expand = expand
        self._written = 0
        self._negated = 0
        self._dropped: Unwritable | None = None
        self._bases: dict[int, str] = {}
        self._pointers: dict[int, str] = {}
        self._known: dict[str, Any] = {}
        self._dynamic: list[str] = []
        self._names: dict[int, str] = {}
        self._defs: dict[str, Any] = {}
        self._types = SchemaTypes(root)
        self._index(root, "", "#")
        self._point_from_root(root)

    def write(self) -> Any:
        """The schema in the library's keywords, with the targets of all references under `$defs`."""
        found = self._yes(self._root, "")
        if found is False and self._dropped is not None:
            if self._strict or not self._expand:
                raise self._dropped
            self._warn(self._dropped)
            return SchemaRewriter(
                self._root, strict=False, invalid=self._invalid, warnings=self._warnings, expand=False
            ).write()
        if self._defs:
            found = {"$defs": self._defs, **(found if isinstance(found, dict) else {"allOf": [found]})}
        return found

    # ---- where references lead

    def _index(self, schema: Any, base: str, pointer: str) -> None:
        if not isinstance(schema, dict) or id(schema) in self._bases:
            return
        own = schema.get("$id", schema.get("id"))
        if "$ref" in schema and re.search(r"draft-0[3-7]", str(self._root.get("$schema"))):
            own = None  # these drafts read nothing beside a reference
        if isinstance(own, str):
            try:
                base = urljoin(base, own)
            except ValueError:
                raise self._invalid(f"has the `$id` {own!r:.80}, which is no address") from None
        self._bases[id(schema)] = base
        self._pointers[id(schema)] = pointer
        if isinstance(own, str):
            self._known.setdefault(base.removesuffix("#"), schema)
        for key in ("$anchor", "$dynamicAnchor"):
            if isinstance(schema.get(key), str):
                self._known.setdefault(f"{urldefrag(base)[0]}#{schema[key]}", schema)
        if isinstance(schema.get("$dynamicAnchor"), str):
            self._dynamic.append(schema["$dynamicAnchor"])
        for path, child in _children(schema):
            self._index(child, base, f"{pointer}/{path}")

    def _point_from_root(self, root: Any) -> None:
        """Write every reference that can be followed as a pointer from the root; the others are judged when met."""
        todo = [root]
        while todo:
            schema = todo.pop()
            if not isinstance(schema, dict):
                continue
            todo += [child for _, child in _children(schema)]
            for key in ("$ref", "$dynamicRef", "$recursiveRef"):
                try:
                    pointer = self._pointers.get(id(self._target(schema.get(key), schema, "")))
                except Exception:
                    continue
                if key in schema and pointer is not None and not self._is_dynamic(key, schema[key]):
                    schema[key] = pointer

    def _is_dynamic(self, keyword: str, reference: str) -> bool:
        """Whether what it names depends on the way by which it is reached."""
        return keyword == "$dynamicRef" and self._dynamic.count(reference.rpartition("#")[2]) > 1

    def _target(self, reference: Any, schema: dict[str, Any], where: str, keyword: str = "$ref") -> Any:
        """What a reference names. Raises Unwritable for what lies outside of the schema."""
        if not isinstance(reference, str):
            raise self._invalid(f"has the `{keyword}` {reference!r:.80}: only references within it are read")
        if self._is_dynamic(keyword, reference):
            raise Unwritable(keyword, where, "names several schemas")
        base = self._bases.get(id(schema), "") if id(schema) in self._pointers else ""
        if not base and reference.startswith("#"):
            base = urldefrag(self._bases.get(id(self._root), ""))[0]
        try:
            whole = urljoin(base, reference) if not reference.startswith("#") else urldefrag(base)[0] + reference
            address, fragment = urldefrag(whole)
        except ValueError:
            raise Unwritable(keyword, where, f"{reference!r:.80} is no address") from None
        if fragment and not fragment.startswith("/"):
            found = self._known.get(whole)
            if found is None:
                raise self._invalid(f"has the `{keyword}` {reference!r:.80}, which names nothing in it")
            return found
        found = self._root if reference.startswith("#/") and id(schema) not in self._pointers else None
        if found is None:
            found = self._known.get(address, self._known.get(f"{address}#"))
        if found is None and (
            reference.startswith("#") or address == urldefrag(self._bases.get(id(self._root), ""))[0]
        ):
            found = self._root
        if found is None:
            raise Unwritable(
                keyword, where, f"{reference!r:.80} lies outside of the schema, and only what is within is read"
            )
        for part in unquote(fragment).split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            if isinstance(found, dict) and part in found:
                found = found[part]
            elif isinstance(found, list) and part.isdecimal() and len(part) < 7 and int(part) < len(found):
                found = found[int(part)]
            else:
                raise self._invalid(f"has the `{keyword}` {reference!r:.80}, which names nothing in it")
        return found

    def _refer(self, target: Any, where: str) -> Any:
        if not isinstance(target, dict):
            return self._yes(target, where)
        name = self._names.get(id(target))
        if name is None:
            name = self._names[id(target)] = f"r{len(self._names)}"
            self._defs[name] = True
            try:
                self._defs[name] = self._yes(target, where)
            except Unwritable:
                # What was written meanwhile may refer to it, and goes with it.
                for key in list(self._names)[list(self._names).index(id(target)) :]:
                    self._defs.pop(self._names[key], None)
                    self._names[key] = ""
                raise
        elif not name:
            raise Unwritable("$ref", where, "leads to what cannot be kept in full")
        return {"$ref": f"#/$defs/{name}"}

    # ---- what a schema admits

    def _yes(self, schema: Any, where: str) -> Any:
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise self._invalid(f"holds {json.dumps(schema)[:40]} where a schema must stand")
        self._written += 1
        if self._written > MAX_WRITTEN:
            raise self._invalid("grows too large when its `not`, `oneOf` and the like are written out")
        schema = _plain(schema, self._invalid)
        own = self._own(schema, where)
        parts: list[Any] = []
        for keyword, write in self._writers(schema, where):
            try:
                if not self._expand and keyword not in ("allOf", "anyOf", "$ref", "oneOf"):
                    raise Unwritable(keyword, _at(where, keyword), "is left to the model")
                part = write()
            except Unwritable as error:
                if self._strict:
                    raise
                self._warn(error)
                continue
            parts.append(part)
        return _all([own, *parts])

    def _warn(self, error: Unwritable) -> None:
        text = f"`{error.keyword}` at `{error.where}` is not enforced"
        if len(self._warnings) < 20 and text not in self._warnings:
            self._warnings.append(text)

    def _own(self, schema: dict[str, Any], where: str) -> Any:
        """The keywords that the library knows, their schemas written."""
        found: dict[str, Any] = {}
        for key in ("type", "const", "enum", *_NUMBERS, "minLength", "maxLength", "minItems", "maxItems", "required"):
            if key in schema:
                found[key] = schema[key]
        for key in ("description", "title"):
            found.pop(key, None)
        if isinstance(schema.get("format"), str) and schema["format"] in FORMATS:
            found["format"] = schema["format"]
        if "pattern" in schema:
            pattern = self._pattern(schema["pattern"], _at(where, "pattern"), "pattern")
            if pattern is not None:
                found["pattern"] = pattern
        for key in ("properties", "patternProperties"):
            if key not in schema:
                continue
            if not isinstance(schema[key], dict):
                raise self._invalid(f"has `{key}` that are no object")
            inner = {name: self._yes(part, _at(where, f"{key}.{name}")) for name, part in schema[key].items()}
            if key == "patternProperties":
                inner = {
                    name: part
                    for name, part in inner.items()
                    if self._pattern(name, _at(where, key), "patternProperties") is not None
                }
            found[key] = inner
        if "prefixItems" in schema:
            found["prefixItems"] = [
                self._yes(part, _at(where, f"prefixItems[{index}]")) for index, part in enumerate(schema["prefixItems"])
            ]
        for key in ("items", "additionalProperties"):
            if key in schema:
                found[key] = self._yes(schema[key], _at(where, key))
        found |= self._sizes(schema, where)
        return found or True

    def _sizes(self, schema: dict[str, Any], where: str) -> dict[str, Any]:
        """minProperties and maxProperties where they say something, and the library can count."""
        low, high = schema.get("minProperties", 0), schema.get("maxProperties")
        required = set(_names(schema.get("required")))
        optional = set(schema.get("properties", {})) - required
        closed = schema.get("additionalProperties") is False and not schema.get("patternProperties")
        found: dict[str, Any] = {}
        missing = low - len(required)
        if missing > 0 and not optional:
            # The library lets a free name come twice, so it counts right up to one of them.
            error = Unwritable("minProperties", _at(where, "minProperties"), "free names might be the same name twice")
            if missing > 1 and self._strict and self._may_be(schema, "object"):
                raise error
            if missing > 1:
                self._warn(error)
            found["minProperties"] = low
        if high is not None and not (closed and len(schema.get("properties", {})) <= high):
            found["maxProperties"] = high
        return found

    def _pattern(self, pattern: Any, where: str, keyword: str) -> str | None:
        if not isinstance(pattern, str):
            raise self._invalid(f"has a `{keyword}` that is no string")
        check_pattern(pattern, self._invalid)
        if _LOOKS.search(pattern.replace("\\\\", "")):
            simple = _without_look(pattern)
            if simple is not None:
                return simple
            error = Unwritable(keyword, where, "looks ahead, behind or back, which a grammar cannot")
            if self._strict:
                raise error
            self._warn(error)
            return None
        return pattern

    def _writers(self, schema: dict[str, Any], where: str) -> Iterator[tuple[str, Callable[..., Any]]]:
        """The keywords of a schema that are parts of their own, each with what writes it."""
        for key in ("$ref", "$dynamicRef", "$recursiveRef"):
            if key in schema:
                yield (
                    key,
                    lambda key=key: self._refer(
                        self._target(schema[key], schema, _at(where, key), key), _at(where, key)
                    ),
                )
        if "allOf" in schema:
            yield (
                "allOf",
                lambda: _all(
                    [self._yes(part, _at(where, f"allOf[{index}]")) for index, part in enumerate(schema["allOf"])]
                ),
            )
        if "anyOf" in schema:
            yield "anyOf", lambda: self._some(schema["anyOf"], where, "anyOf")
        if "oneOf" in schema:
            yield "oneOf", lambda: self._one_of(schema["oneOf"], where)
        if "not" in schema:
            yield "not", lambda: self._solid("not", where, self._no(schema["not"], _at(where, "not")))
        if "if" in schema and ("then" in schema or "else" in schema):
            yield "if", lambda: self._if(schema, where)
        for name, names in schema.get("dependentRequired", {}).items():
            yield (
                "dependentRequired",
                lambda name=name, names=names: _any([_absent(name), {"required": [name, *_names(names)]}]),
            )
        for name, inner in schema.get("dependentSchemas", {}).items():
            yield (
                "dependentSchemas",
                lambda name=name, inner=inner: _any(
                    [
                        _absent(name),
                        _all(
                            [
                                {"properties": {name: True}, "required": [name]},
                                self._yes(inner, _at(where, f"dependentSchemas.{name}")),
                            ]
                        ),
                    ]
                ),
            )
        if "contains" in schema:
            yield "contains", lambda: self._contains(schema, where)
        if schema.get("uniqueItems") is True:
            yield "uniqueItems", lambda: self._unique(schema, where)
        if "propertyNames" in schema:
            yield "propertyNames", lambda: self._property_names(schema, where)
        if "unevaluatedProperties" in schema:
            yield "unevaluatedProperties", lambda: self._unevaluated_properties(schema, where)
        if "unevaluatedItems" in schema:
            yield "unevaluatedItems", lambda: self._unevaluated_items(schema, where)
        if schema.get("minProperties", 0) and schema.get("properties"):
            yield "minProperties", lambda: self._least(schema, where)

    def _some(self, branches: Any, where: str, key: str) -> Any:
        if not isinstance(branches, list) or not branches:
            raise self._invalid(f"has an `{key}` that is no list of schemas")
        found: list[Any] = []
        failed: Unwritable | None = None
        for index, branch in enumerate(branches):
            try:
                found.append(self._yes(branch, _at(where, f"{key}[{index}]")))
            except Unwritable as error:
                failed = self._dropped = error
        if failed is not None and not found:
            raise failed
        return _any(found)

    def _solid(self, keyword: str, where: str, found: Any) -> Any:
        if found is False and self._negated == 0 and not self._strict:
            raise Unwritable(keyword, _at(where, keyword), "leaves nothing")
        return found

    def _one_of(self, branches: Any, where: str) -> Any:
        if not isinstance(branches, list) or not branches:
            raise self._invalid("has a `oneOf` that is no list of schemas")
        here = _at(where, "oneOf")
        rivals: dict[int, list[int]] = {0: [0]}
        if len(branches) <= MAX_CASES:
            pairs = list(itertools.combinations(range(len(branches)), 2))
            close = {(one, two) for one, two in pairs if not self._disjoint(branches[one], branches[two], 0)}
            rivals = {
                index: [two if one == index else one for one, two in close if index in (one, two)]
                for index in range(len(branches))
            }
        if not any(rivals.values()):
            return self._some(branches, where, "oneOf")
        found: list[Any] = []
        failed: Unwritable | None = None
        for index, others in rivals.items():
            try:
                parts = [self._yes(branches[index], f"{here}[{index}]")]
                parts += [self._no(branches[other], f"{here}[{other}]") for other in others]
                found.append(_all(parts))
            except Unwritable as error:
                failed = self._dropped = error
        written = _any(found)
        if written is False or not self._expand:
            why = "its branches may hold at once, and cannot be told apart"
            vague = Unwritable("oneOf", here, why if failed is None else f"{why}: {failed.keyword}")
            if self._strict:
                raise vague
            self._warn(vague)
            return self._some(branches, where, "oneOf")
        return written

    def _if(self, schema: dict[str, Any], where: str) -> Any:
        yes, no = schema.get("then", True), schema.get("else", True)
        cases: list[Any] = []
        failed: Unwritable | None = None
        for condition, branch, key in ((self._yes, yes, "then"), (self._no, no, "else")):
            try:
                cases.append(_all([condition(schema["if"], _at(where, "if")), self._yes(branch, _at(where, key))]))
            except Unwritable as error:
                failed = self._dropped = error
        if failed is not None and _any(cases) is False:
            raise Unwritable("if", _at(where, "if"), f"its condition cannot be turned round: {failed.keyword}")
        return _any(cases)

    def _contains(self, schema: dict[str, Any], where: str) -> Any:
        inner, low, high = schema["contains"], schema.get("minContains", 1), schema.get("maxContains")
        here = _at(where, "contains")
        if high is not None and high < low:
            return {"type": [name for name in TYPES if name != "array"]}
        yes = self._yes(inner, here)
        most = min(schema.get("maxItems", MAX_POSITION), MAX_POSITION + low)
        others: Any = [name for name in TYPES if name != "array"]
        cases: list[Any] = [{"type": others}]
        if high is None:
            if low == 0:
                return True
            if yes is True:
                return {"minItems": low}
            if low > most:
                return False if low > schema.get("maxItems", low) else self._cannot("contains", here, "asks for many")
            for places in itertools.islice(itertools.combinations(range(most), low), MAX_CASES):
                prefix = [yes if place in places else True for place in range(places[-1] + 1)]
                cases.append({"type": "array", "prefixItems": prefix, "minItems": len(prefix)})
            return _any(cases)
        no = self._no(inner, here)
        for count in range(low, min(high, most) + 1):
            for places in itertools.islice(itertools.combinations(range(most), count), MAX_CASES // 4):
                prefix = [yes if place in places else no for place in range(places[-1] + 1)] if places else []
                cases.append({"type": "array", "prefixItems": prefix, "items": no, "minItems": len(prefix)})
        return _any(cases)

    def _cannot(self, keyword: str, where: str, why: str) -> Any:
        raise Unwritable(keyword, where, why)

    def _unique(self, schema: dict[str, Any], where: str) -> Any:
        """Arrays of values that are listed, none of them twice: all such arrays, up to a length that can be written."""
        low, high = schema.get("minItems", 0), schema.get("maxItems")
        if high is not None and high <= 1:
            return True
        if not self._may_be(schema, "array"):
            return True
        prefix, items = schema.get("prefixItems", []), schema.get("items", True)
        if items is False and prefix:
            if self._apart(prefix):
                return True
        elif not prefix:
            values = self._listed(items)
            if values is not None:
                return self._permutations(values, low, high, where)
        raise Unwritable(
            "uniqueItems", _at(where, "uniqueItems"), "can be kept only where the items are listed by `enum`"
        )

    def _apart(self, schemas: list[Any]) -> bool:
        return all(self._disjoint(left, right, 0) for left, right in itertools.combinations(schemas, 2))

    def _listed(self, schema: Any) -> list[Any] | None:
        """All values of a schema, where they are few and listed; None else."""
        values = self._types.values(schema)
        if values is None and self._types.types(schema) <= {"boolean", "null"}:
            kinds = self._types.types(schema)
            values = ([True, False] if "boolean" in kinds else []) + ([None] if "null" in kinds else [])
        if values is None or len(values) > 400:
            return None
        return [json.loads(text) for text in dict.fromkeys(map(_canonical, values))]

    def _permutations(self, values: list[Any], low: int, high: int | None, where: str) -> Any:
        most = len(values) if high is None else min(high, len(values))
        if low > most:
            return {"type": [name for name in TYPES if name != "array"]}
        # The last place may hold any of the values that are left, so a case is a choice of those before it.
        length = min(most, max(low, 2))
        if math.perm(len(values), max(length - 1, 0)) > 2 * MAX_CASES:
            raise Unwritable("uniqueItems", _at(where, "uniqueItems"), "has too many values to choose from")
        while length < most and math.perm(len(values), length) <= MAX_CASES:
            length += 1
        cases: list[Any] = [{"type": [name for name in TYPES if name != "array"]}]
        if low == 0:
            cases.append({"type": "array", "maxItems": 0})
        for count in range(max(1, low), length + 1) if length < 3 else (length,):
            for chosen in itertools.permutations(range(len(values)), count - 1):
                left = [value for index, value in enumerate(values) if index not in chosen]
                prefix = [{"const": values[index]} for index in chosen]
                # From three on one case holds the shorter ones too: fewer of the chosen, then the end.
                least = max(low, min(count - 1, 1)) if length >= 3 else count
                case = {"type": "array", "prefixItems": [*prefix, {"enum": left}], "items": False}
                cases.append({**case, "minItems": least, "maxItems": count})
        return _any(cases)

    def _property_names(self, schema: dict[str, Any], where: str) -> Any:
        here = _at(where, "propertyNames")
        names = schema["propertyNames"]
        if names is True or not self._may_be(schema, "object"):
            return True
        if names is False or (isinstance(names, dict) and "string" not in self._types.types(names)):
            return {"additionalProperties": False}
        if isinstance(names, dict) and set(names) == {"$ref"}:
            names = self._target(names["$ref"], names, here)
        names = _plain(names, self._invalid) if isinstance(names, dict) else {}
        told = {key for key in names if key not in ("type", "description", "title", "$comment", "$schema", "examples")}
        if not told or (told == {"format"} and names["format"] not in FORMATS):
            return True
        if told <= {"enum", "const"}:
            values = [name for name in self._types.values(names) or [] if isinstance(name, str)]
            rest, inner = schema.get("additionalProperties", True), schema.get("properties", {})
            patterns = schema.get("patternProperties")
            if patterns:
                raise Unwritable("propertyNames", here, "stands beside `patternProperties`")
            written = {name: self._yes(inner.get(name, rest), _at(where, "additionalProperties")) for name in values}
            return {"properties": written, "additionalProperties": False}
        if told == {"pattern"}:
            pattern = self._pattern(names["pattern"], here, "propertyNames")
        elif told <= {"minLength", "maxLength"}:
            pattern = f"^[\\s\\S]{{{names.get('minLength', 0)},{names.get('maxLength', '')}}}$"
        else:
            raise Unwritable("propertyNames", here, "can be kept for one pattern, a length, or names that are listed")
        if pattern is None:
            return True
        given = schema.get("patternProperties", {})
        if given and set(given) != {pattern}:
            raise Unwritable("propertyNames", here, "stands beside `patternProperties`")
        forbidden = {}
        for name in schema.get("properties", {}):
            try:
                matches = re.search(pattern, name) is not None
            except re.error:
                raise Unwritable("propertyNames", here, "cannot be compared with the names of `properties`") from None
            if not matches:
                forbidden[name] = False
        inner = {**given} or {pattern: True}
        return {"properties": forbidden, "patternProperties": dict.fromkeys(inner, True), "additionalProperties": False}

    def _least(self, schema: dict[str, Any], where: str) -> Any:
        """minProperties beside optional properties: some of them are there."""
        required = _names(schema.get("required"))
        missing = schema["minProperties"] - len(set(required))
        optional = [name for name, inner in schema["properties"].items() if name not in required and inner is not False]
        if missing <= 0 or not self._may_be(schema, "object"):
            return True
        if not optional:
            return True
        if missing > len(optional) or math.comb(len(optional), missing) > MAX_CASES:
            raise Unwritable("minProperties", _at(where, "minProperties"), "has too many properties to choose from")
        return _any(
            [{"type": [name for name in TYPES if name != "object"]}]
            + [{"type": "object", "required": list(names)} for names in itertools.combinations(optional, missing)]
        )

    def _unevaluated_properties(self, schema: dict[str, Any], where: str) -> Any:
        rest, here = schema["unevaluatedProperties"], _at(where, "unevaluatedProperties")
        if rest is True or rest == {} or "additionalProperties" in schema or not self._may_be(schema, "object"):
            return True
        unions = [key for key in ("anyOf", "oneOf") if key in schema]
        if len(unions) > 1 or "if" in schema or "dependentSchemas" in schema:
            raise Unwritable("unevaluatedProperties", here, "stands beside conditions")
        written = self._yes(rest, here)
        own = {key: value for key, value in schema.items() if key not in ("anyOf", "oneOf", "unevaluatedProperties")}
        names = self._evaluated(own, here, 0)
        cases: list[Any] = []
        for branch in schema[unions[0]] if unions else (True,):
            more = self._evaluated(branch, here, 0)
            if names is None or more is None:
                cases.append(self._yes(branch, here))
                continue
            closed: dict[str, Any] = {
                "properties": dict.fromkeys([*names[0], *more[0]], True), "additionalProperties": written
            }  # fmt: skip
            if names[1] or more[1]:
                closed["patternProperties"] = dict.fromkeys([*names[1], *more[1]], True)
            cases.append(_all([self._yes(branch, here), closed]))
        return _any(cases)

    def _evaluated(self, schema: Any, here: str, depth: int) -> tuple[set[str], set[str]] | None:
        """Names and patterns that a schema looks at whenever it holds; None for all."""
        names: set[str] = set()
        patterns: set[str] = set()
        if not isinstance(schema, dict):
            return names, patterns
        if depth > 12 or any(key in schema for key in ("anyOf", "oneOf", "if", "dependentSchemas", "$dynamicRef")):
            raise Unwritable("unevaluatedProperties", here, "stands beside conditions")
        if "additionalProperties" in schema or "unevaluatedProperties" in schema:
            return None
        names |= set(schema.get("properties", {}))
        patterns |= set(schema.get("patternProperties", {}))
        parts = list(schema.get("allOf", []))
        if "$ref" in schema:
            parts.append(self._target(schema["$ref"], schema, here))
        for part in parts:
            more = self._evaluated(part, here, depth + 1)
            if more is None:
                return None
            names |= more[0]
            patterns |= more[1]
        return names, patterns

    def _unevaluated_items(self, schema: dict[str, Any], where: str) -> Any:
        rest = schema["unevaluatedItems"]
        if rest is True or rest == {} or "items" in schema or not self._may_be(schema, "array"):
            return True
        here = _at(where, "unevaluatedItems")
        length = self._evaluated_items(
            {key: value for key, value in schema.items() if key != "unevaluatedItems"}, here, 0
        )
        if length is None:
            return True
        return {"prefixItems": [True] * length, "items": self._yes(rest, here)}

    def _evaluated_items(self, schema: Any, here: str, depth: int) -> int | None:
        """How many items a schema looks at whenever it holds; None for all."""
        if not isinstance(schema, dict):
            return 0
        if depth > 12 or any(key in schema for key in _IN_PLACE if key not in ("$ref", "allOf")):
            raise Unwritable("unevaluatedItems", here, "stands beside conditions")
        if depth and "contains" in schema:
            raise Unwritable("unevaluatedItems", here, "stands beside `contains`")
        schema = _plain(schema, self._invalid)
        if "items" in schema or "unevaluatedItems" in schema:
            return None
        found = len(schema.get("prefixItems", ()))
        parts = list(schema.get("allOf", ()))
        if "$ref" in schema:
            parts.append(self._target(schema["$ref"], schema, here))
        for part in parts:
            more = self._evaluated_items(part, here, depth + 1)
            if more is None:
                return None
            found = max(found, more)
        return found

    def _may_be(self, schema: Any, kind: str) -> bool:
        return kind in self._types.types(schema)

    # ---- what it does not admit

    def _no(self, schema: Any, where: str) -> Any:
        """Values that a schema does not admit; perhaps not all of them. Raises Unwritable where none can be told."""
        if isinstance(schema, bool):
            return not schema
        if not isinstance(schema, dict):
            raise self._invalid(f"holds {json.dumps(schema)[:40]} where a schema must stand")
        self._written += 1
        if self._written > MAX_WRITTEN:
            raise Unwritable("not", where, "grows too large")
        if self._negated >= MAX_NEGATED_DEPTH:
            raise Unwritable("not", where, "is nested too deep, or leads back to itself")
        self._negated += 1
        try:
            plain = _plain(schema, self._invalid)
            cases: list[Any] = []
            failed: Unwritable | None = None
            for write in self._negations(plain, where):
                try:
                    cases.append(write())
                except Unwritable as error:
                    failed = self._dropped = error
            found = _any(cases)
            if found is False and failed is not None:
                raise failed
            return found
        finally:
            self._negated -= 1

    def _negations(self, schema: dict[str, Any], where: str) -> Iterator[Callable[..., Any]]:
        """For each keyword, what writes the values that break it."""
        for key, value in schema.items():
            kind = _TYPE_OF.get(key)
            if (
                kind is not None
                and not self._may_be(schema, kind)
                and not (kind == "number" and self._may_be(schema, "integer"))
            ):
                continue
            match key:
                case "type":
                    yield lambda value=value: _not_types(value)
                case "const" | "enum":
                    yield lambda key=key, value=value: _not_values([value] if key == "const" else value)
                case "minLength" | "minItems" | "minProperties":
                    kind = {"minLength": "string", "minItems": "array"}.get(key, "object")
                    most = key.replace("min", "max")
                    yield (
                        lambda kind=kind, most=most, value=value: (
                            {"type": kind, most: value - 1} if value > 0 else False
                        )
                    )
                case "maxLength" | "maxItems" | "maxProperties":
                    kind = {"maxLength": "string", "maxItems": "array"}.get(key, "object")
                    least = key.replace("max", "min")
                    if key == "maxProperties" and value > 0:
                        yield lambda: self._cannot("maxProperties", where, "cannot be turned round")
                        continue
                    yield lambda kind=kind, least=least, value=value: {"type": kind, least: value + 1}
                case "minimum":
                    yield lambda value=value: {"type": "number", "exclusiveMaximum": value}
                case "maximum":
                    yield lambda value=value: {"type": "number", "exclusiveMinimum": value}
                case "exclusiveMinimum":
                    yield lambda value=value: {"type": "number", "maximum": value}
                case "exclusiveMaximum":
                    yield lambda value=value: {"type": "number", "minimum": value}
                case "properties":
                    for name, inner in value.items():
                        yield lambda name=name, inner=inner: _all(
                            [
                                {
                                    "type": "object",
                                    "required": [name],
                                    "properties": {name: self._no(inner, _at(where, f"properties.{name}"))},
                                }
                            ]
                        )
                case "required":
                    for name in _names(value):
                        yield lambda name=name: {"type": "object", "properties": {name: False}}
                case "items":
                    begin = len(schema.get("prefixItems", []))
                    yield lambda value=value, begin=begin: _any(
                        [_item(place, self._no(value, _at(where, "items"))) for place in range(begin, begin + 3)]
                    )
                case "prefixItems":
                    for place, inner in enumerate(value):
                        yield lambda place=place, inner=inner: _item(place, self._no(inner, where))
                case "contains" if schema.get("minContains", 1) == 1:
                    yield lambda value=value: {"type": "array", "items": self._no(value, _at(where, "contains"))}
                case "dependentRequired":
                    for name, names in value.items():
                        for other in _names(names):
                            yield lambda name=name, other=other: {
                                "type": "object", "required": [name], "properties": {other: False}
                            }  # fmt: skip
                case "dependentSchemas":
                    for name, inner in value.items():
                        yield lambda name=name, inner=inner: _all(
                            [{"type": "object", "required": [name]}, self._no(inner, where)]
                        )
                case "allOf":
                    for inner in value:
                        yield lambda inner=inner: self._no(inner, where)
                case "anyOf" | "oneOf":
                    yield lambda value=value: _all([self._no(inner, where) for inner in value])
                case "not":
                    yield lambda value=value: self._yes(value, where)
                case "if" if "then" in schema or "else" in schema:
                    yield lambda: _all([self._yes(schema["if"], where), self._no(schema.get("then", True), where)])
                    yield lambda: _all([self._no(schema["if"], where), self._no(schema.get("else", True), where)])
                case "$ref":
                    yield lambda value=value: self._no(self._target(value, schema, where), where)
                case "pattern":
                    yield lambda value=value: {"type": "string", "pattern": self._not_pattern(value, where)}
                case "format" if value in FORMATS:
                    yield lambda: self._cannot("format", where, "cannot be turned round")
                case "multipleOf" | "uniqueItems" | "propertyNames" | "patternProperties" | "$dynamicRef" as word:
                    if not (word == "uniqueItems" and value is False):
                        yield lambda word=word: self._cannot(word, where, "cannot be turned round")
                case "additionalProperties" | "unevaluatedProperties" | "unevaluatedItems" as word:
                    if value is not True and value != {}:
                        yield lambda word=word: self._cannot(word, where, "cannot be turned round")

    def _not_pattern(self, pattern: str, where: str) -> str:
        """A pattern for the strings that one of a plain text does not match."""
        begins, ends = pattern.startswith("^"), pattern.endswith("$") and not pattern.endswith("\\$")
        text = _literal(pattern[begins : len(pattern) - ends])
        if text is None or not begins:
            raise Unwritable("pattern", _at(where, "pattern"), "cannot be turned round")
        return _other_strings([text], prefix=not ends)

    # ---- what excludes each other

    def _disjoint(self, left: Any, right: Any, depth: int) -> bool:
        """Whether no value is of both; False where it cannot be told."""
        if left is False or right is False:
            return True
        if depth > 6 or not isinstance(left, dict) or not isinstance(right, dict):
            return False
        mine, other = self._types.types(left), self._types.types(right)
        if not _wide(mine) & _wide(other):
            return True
        values, rivals = self._types.values(left), self._types.values(right)
        if (
            values is not None
            and rivals is not None
            and not set(map(_canonical, values)) & set(map(_canonical, rivals))
        ):
            return True
        left, right = self._resolved(left), self._resolved(right)
        for one, two in ((left, right), (right, left)):
            for key in ("anyOf", "oneOf"):
                branches = one.get(key)
                if (
                    isinstance(branches, list)
                    and branches
                    and all(self._disjoint(inner, two, depth + 1) for inner in branches)
                ):
                    return True
            if any(self._disjoint(inner, two, depth + 1) for inner in one.get("allOf") or ()):
                return True
        shared = _wide(mine) & _wide(other)
        if shared == {"number"}:
            return _above(left, right) or _above(right, left)
        if shared == {"string"}:
            return _counts_apart(left, right, "Length")
        if shared == {"array"}:
            return _counts_apart(left, right, "Items")
        if shared != {"object"}:
            return False
        for name in {*_names(left.get("required")), *_names(right.get("required"))}:
            inners = [_property(one, name) for one in (left, right)]
            if self._disjoint(inners[0], inners[1], depth + 1):
                return True
        return False

    def _resolved(self, schema: dict[str, Any]) -> dict[str, Any]:
        for _ in range(8):
            if set(schema) - {"description", "title"} != {"$ref"}:
                break
            try:
                found = self._target(schema["$ref"], schema, "")
            except Unwritable:
                break
            if not isinstance(found, dict):
                break
            schema = found
        return schema


# ---- small things


def check_pattern(pattern: str, invalid: Callable[[str], Exception]) -> None:
    """Raises the caller's error for what is no regular expression at all, in ECMAScript's eyes or Python's."""
    text = re.sub(r"\\[pP]\{[^}]*\}|\\u\{[0-9a-fA-F]+\}", "a", pattern)
    text = re.sub(r"\\c[A-Za-z]|\\k<\w+>", "a", text)
    text = text.replace("[^]", "[^a]").replace("(?<", "(?P<").replace("(?P<=", "(?<=").replace("(?P<!", "(?<!")
    # Python wants a fixed width behind; what stands there matters not here.
    text = re.sub(r"\(\?<[=!]", "(?:", text)
    text = re.sub(r"\\([a-zA-Z])", lambda found: found[0] if found[1] in "dDwWsSbBnrtfvxu" else found[1], text)
    try:
        re.compile(text)
    except re.error as error:
        raise invalid(f"has the pattern {pattern!r:.60}, which is no regular expression: {error.msg}") from None
    except (RecursionError, OverflowError):
        raise invalid(f"has the pattern {pattern!r:.60}, which is too deep or too large") from None


def _without_look(pattern: str) -> str | None:
    """The pattern of a text that must not begin so, or must not be empty, without looking ahead; None for others."""
    found = re.fullmatch(r"\^\(\?!((?:[^()\[\]|\\]|\\.)*)\)(?:\.\*|\[\\s\\S\]\*)?\$?", pattern)
    if found is None:
        return None
    inner = found[1]
    whole = inner.endswith("$")
    text = _literal(inner[:-1] if whole else inner)
    return (
        None
        if not text or "\n" in text
        else _other_strings([text], prefix=not whole, any_text="." if ".*" in pattern else None)
    )


def _literal(pattern: str) -> str | None:
    """The text that a pattern stands for, where it stands for one."""
    plain = re.sub(r"\\([^a-zA-Z0-9])", "", pattern)
    if re.search(r"[\\.*+?()\[\]{}|^$]", plain):
        return None
    return re.sub(r"\\([^a-zA-Z0-9])", r"\1", pattern)


def _other_strings(texts: list[str], *, prefix: bool = False, any_text: str | None = None) -> str:
    """A pattern for every string but these; prefix: but those that begin with one."""
    rest = (any_text or "[\\s\\S]") + "*"
    any_one = any_text or "[\\s\\S]"
    tree: dict[str, Any] = {}
    for text in texts:
        node = tree
        for letter in text:
            node = node.setdefault(letter, {})
        node[""] = {}

    def write(node: dict[str, Any]) -> str | None:
        """What may follow here; None where nothing may."""
        ends = "" in node
        if ends and prefix:
            return None
        letters = [letter for letter in node if letter]
        options: list[str] = []
        if letters:
            options.append(f"[^{''.join(map(_escaped, letters))}]{rest}")
        else:
            options.append(f"{any_one}{rest}")
        for letter in letters:
            inner = write(node[letter])
            if inner is not None:
                options.append(f"{re.escape(letter)}{inner}")
        return f"(?:{'|'.join(options)})" + ("" if ends else "?")

    found = write(tree)
    return f"^{found}$" if found is not None else "^[^\\s\\S]$"


def _escaped(letter: str) -> str:
    return "\\" + letter if letter in "\\]^-[&~" else letter


def _plain(schema: dict[str, Any], invalid: Callable[[str], Exception]) -> dict[str, Any]:
    """The schema with the older drafts' words in those of 2020-12, and without what constrains nothing."""
    found = dict(schema)
    for key in _COUNTS:
        value = found.get(key)
        if isinstance(value, float) and value.is_integer():
            found[key] = value = int(value)
        if key in found and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise invalid(f"has a `{key}` that is no whole number from 0 on")
    for key in _NUMBERS:
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


def _at(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _names(value: Any) -> list[str]:
    return [name for name in value if isinstance(name, str)] if isinstance(value, list) else []


def _absent(name: str) -> dict[str, Any]:
    return {"properties": {name: False}}


def _item(place: int, inner: Any) -> Any:
    if inner is False:
        return False
    return {"type": "array", "prefixItems": [*[True] * place, inner], "minItems": place + 1}


def _all(parts: Iterable[Any]) -> Any:
    kept = [part for part in parts if part is not True and part != {}]
    if any(part is False for part in kept):
        return False
    if len(kept) < 2:
        return kept[0] if kept else True
    types = set(TYPES)
    for part in kept:
        types &= _told_types(part)
    return {"allOf": kept} if types else False


def _told_types(schema: Any) -> set[str]:
    """The types that a schema in the library's keywords can be of, seen without following references."""
    if schema is False:
        return set()
    found = set(TYPES)
    if not isinstance(schema, dict):
        return found
    if "type" in schema:
        found &= _wide([schema["type"]] if isinstance(schema["type"], str) else schema["type"])
    if "const" in schema:
        found &= {_type(schema["const"])}
    elif "enum" in schema:
        found &= set(map(_type, schema["enum"]))
    if "anyOf" in schema:
        found &= set[str]().union(*map(_told_types, schema["anyOf"]))
    for part in schema.get("allOf", ()):
        found &= _told_types(part)
    return found


def _any(parts: Iterable[Any]) -> Any:
    kept = [part for part in parts if part is not False]
    if any(part is True or part == {} for part in kept):
        return True
    if len(kept) < 2:
        return kept[0] if kept else False
    return {"anyOf": kept}


def _not_types(value: Any) -> Any:
    given = {value} if isinstance(value, str) else set(value)
    # A number that is no integer is beyond the library; without it the rest is still right.
    left = [name for name in TYPES if name not in given and not (name == "number" and "integer" in given)]
    return {"type": left} if left else False


def _not_values(values: list[Any]) -> Any:
    by_type: dict[str, list[Any]] = {}
    for value in values:
        by_type.setdefault(_type(value), []).append(value)
    cases: list[Any] = [{"type": [name for name in TYPES if name not in by_type]}] if len(by_type) < len(TYPES) else []
    for kind, listed in by_type.items():
        if kind == "boolean":
            cases += [{"const": value} for value in (True, False) if value not in listed]
        elif kind == "string":
            cases.append({"type": "string", "pattern": _other_strings(listed)})
        elif kind == "number":
            points = sorted(set(listed))
            bounds = [None, *points, None]
            for low, high in itertools.pairwise(bounds):
                case: dict[str, Any] = {"type": "number"}
                if low is not None:
                    case["exclusiveMinimum"] = low
                if high is not None:
                    case["exclusiveMaximum"] = high
                cases.append(case)
        elif kind == "array":
            cases.append({"type": "array", "minItems": max(map(len, listed)) + 1})
        elif kind == "object":
            # Without one name of each of them, whatever else is there.
            case = {"type": "object", "properties": {next(iter(value)): False for value in listed if value}}
            cases.append(case if {} not in listed else {**case, "minProperties": 1})
    return _any(cases)


def _type(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "number"
    if isinstance(value, str):
        return "string"
    return "array" if isinstance(value, list) else "object"


def _wide(types: Iterable[str]) -> set[str]:
    return {"number" if name == "integer" else name for name in types}


def _property(schema: dict[str, Any], name: str) -> Any:
    properties = schema.get("properties")
    if isinstance(properties, dict) and name in properties:
        return properties[name]
    if schema.get("patternProperties"):
        return True
    return schema.get("additionalProperties", True)


def _above(left: dict[str, Any], right: dict[str, Any]) -> bool:
    """Whether the numbers of one end below those of the other."""
    for end, ends in (("maximum", False), ("exclusiveMaximum", True)):
        for begin, begins in (("minimum", False), ("exclusiveMinimum", True)):
            high, low = left.get(end), right.get(begin)
            if _is_number(high) and _is_number(low) and (high < low or (high == low and (ends or begins))):
                return True
    return False


def _counts_apart(left: dict[str, Any], right: dict[str, Any], what: str) -> bool:
    for one, two in ((left, right), (right, left)):
        high, low = one.get(f"max{what}"), two.get(f"min{what}")
        if _is_number(high) and _is_number(low) and high < low:
            return True
    return False


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _canonical(value: Any) -> str:
    """Equal for values that JSON Schema holds equal: 1 is 1.0."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, sort_keys=True)


def _children(schema: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The schemas inside of one, each with its part of a pointer."""
    for key in _MAPS:
        if isinstance(schema.get(key), dict):
            for name, child in schema[key].items():
                yield f"{key}/{quote(name.replace('~', '~0').replace('/', '~1'))}", child
    for key in (*_LISTS, "items"):
        if isinstance(schema.get(key), list):
            for index, child in enumerate(schema[key]):
                yield f"{key}/{index}", child
    for key in _SINGLE:
        if isinstance(schema.get(key), dict):
            yield key, schema[key]

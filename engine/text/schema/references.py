"""Where the references of a schema lead: pointers, `$id`, anchors. Nothing outside of the schema is read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote, unquote, urldefrag, urljoin

from engine.text.schema.errors import Unwritable

_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_SINGLE = (
    "additionalProperties", "additionalItems", "items", "not", "if", "then", "else", "contains", "propertyNames",
    "unevaluatedProperties", "unevaluatedItems",
)  # fmt: skip


class References:
    """The references of one schema, by their targets. Writes them in it as pointers from the root.

    invalid: makes the error for a reference that names nothing, from a sentence's end.
    """

    def __init__(self, root: Any, invalid: Callable[[str], Exception]) -> None:
        self._root = root
        self._invalid = invalid
        self._bases: dict[int, str] = {}
        self._pointers: dict[int, str] = {}
        self._known: dict[str, Any] = {}
        self._dynamic: list[str] = []
        self._index(root, "", "#")
        self._point_from_root(root)

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
        for path, child in children(schema):
            self._index(child, base, f"{pointer}/{path}")

    def _point_from_root(self, root: Any) -> None:
        """Write every reference that can be followed as a pointer from the root; the others are judged when met."""
        todo = [root]
        while todo:
            schema = todo.pop()
            if not isinstance(schema, dict):
                continue
            todo += [child for _, child in children(schema)]
            for key in ("$ref", "$dynamicRef", "$recursiveRef"):
                try:
                    pointer = self._pointers.get(id(self.target(schema.get(key), schema, "")))
                except Exception:
                    continue
                if key in schema and pointer is not None and not self._is_dynamic(key, schema[key]):
                    schema[key] = pointer

    def _is_dynamic(self, keyword: str, reference: str) -> bool:
        """Whether what it names depends on the way by which it is reached."""
        return keyword == "$dynamicRef" and self._dynamic.count(reference.rpartition("#")[2]) > 1

    def target(self, reference: Any, schema: dict[str, Any], where: str, keyword: str = "$ref") -> Any:
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


def children(schema: dict[str, Any]) -> Iterator[tuple[str, Any]]:
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

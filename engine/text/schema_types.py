"""What JSON types a schema admits, and what a value that a model wrote as bare text is in JSON.

References, unions, lists of types, `const` and `enum` are resolved, so that no caller compares a schema's words.
Schemas are a client's: every walk is bounded, and what cannot be told admits everything.
"""

from __future__ import annotations

import ast
import json
import math
import re
import warnings
from typing import Any
from urllib.parse import unquote

Types = frozenset[str]

ALL: Types = frozenset({"string", "number", "integer", "boolean", "object", "array", "null"})
_NOTHING: Types = frozenset()
_TEXT: Types = frozenset({"string"})
# Steps of one walk; a schema that takes more says nothing.
_MAX_STEPS = 2000
_MAX_DEPTH = 48
# Longer numbers are text where a text may stand; and a literal of Python is read by Python's own slow parser.
MAX_SCALAR = 256
_MAX_LITERAL = 256 * 1024
# Types by the words that people write for them, which the standard does not know.
_WORDS = {
    **{name: name for name in ALL},
    **dict.fromkeys(("str", "text", "varchar", "char", "enum", "date", "datetime"), "string"),
    **dict.fromkeys(("int", "int32", "int64", "uint", "long", "short", "unsigned"), "integer"),
    **dict.fromkeys(("num", "float", "float32", "float64", "double", "decimal"), "number"),
    **dict.fromkeys(("bool", "binary"), "boolean"),
    **dict.fromkeys(("dict", "dictionary", "map", "mapping"), "object"),
    **dict.fromkeys(("arr", "list", "tuple", "set"), "array"),
    **dict.fromkeys(("none", "nil"), "null"),
}
# Keywords that speak of one type; who writes them without a `type` means it.
_IMPLIED = {
    "object": ("properties", "patternProperties", "additionalProperties", "required", "minProperties", "maxProperties"),
    "array": ("items", "prefixItems", "contains", "minItems", "maxItems", "uniqueItems"),
    "string": ("minLength", "maxLength", "pattern", "format", "contentEncoding", "contentMediaType"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}
_SPELLINGS = {"boolean": ("true", "false", "True", "False"), "null": ("null", "None")}
_PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}
_SURROGATE = re.compile("[\ud800-\udfff]")
_NUMBER_BEGUN = re.compile(r"[-0-9.eE+]*")


class SchemaTypes:
    """The types of the schemas inside of `root`, to which their references point; any value may be given as a schema.

    A tool's root is its `parameters`.
    """

    def __init__(self, root: Any) -> None:
        self._root = root
        self._left = 0
        # By identity: the schemas live as long as the root does.
        self._known: dict[tuple[int, bool], tuple[Any, Types]] = {}

    def types(self, schema: Any, *, implied: bool = False) -> Types:
        """The types that a value may have; "integer" stands beside every "number". Empty where nothing is admitted.

        implied: keywords of one type, such as `properties`, stand for a `type` that is missing.
        """
        key = (id(schema), implied)
        known = self._known.get(key)
        if known is None:
            self._left = _MAX_STEPS
            found = self._walk(schema, implied, frozenset(), 0)
            known = self._known[key] = (schema, ALL if found is None else found)
        return known[1]

    def property(self, name: str) -> Any:
        """The schema of a property of the root; True, which admits everything, for one that it does not name."""
        return self.property_of(self._root, name)

    def property_of(self, schema: Any, name: str) -> Any:
        """The same for any schema inside of the root."""
        self._left = _MAX_STEPS
        return self._property(schema, name, 0)

    def items_of(self, schema: Any) -> Any:
        """The schema of a list's items; True where it says nothing of them."""
        self._left = _MAX_STEPS
        return self._items(schema, 0)

    def properties(self) -> dict[str, Any]:
        """The root's own properties by name, those that its `allOf` and `$ref` add included."""
        self._left = _MAX_STEPS
        found: dict[str, Any] = {}
        self._collect(self._root, found, 0)
        return found

    def values(self, schema: Any) -> list[Any] | None:
        """All values that are admitted, where `enum` and `const` list them; None for a schema without such a list."""
        self._left = _MAX_STEPS
        return self._values(schema, 0)

    def admits(self, schema: Any, value: Any) -> bool:
        """Whether the value has one of the types, or is one of the values that are listed. Looks into no container."""
        self._left = _MAX_STEPS
        return self._admits(schema, value, 0)

    def read_value(self, text: str, schema: Any) -> str:
        """The JSON text of a value written as bare text: text where a string is admitted and no other type takes it."""
        types = self.types(schema, implied=True)
        if types <= _TEXT:
            return json.dumps(text, ensure_ascii=False)
        written = text.strip()
        found = _as_json(written, lenient="string" not in types)
        if found is not None:
            value = json.loads(found)
            if isinstance(value, str):
                if types == ALL:
                    return found
            elif self.admits(schema, value):
                whole = isinstance(value, float) and "number" not in types and value.is_integer()
                return str(int(value)) if whole else found
        if "string" in types:
            return json.dumps(text, ensure_ascii=False)
        if found == "null":
            # For no value at all: the text would be as wrong, and say less.
            return found
        if found is not None and isinstance(value, str) and not value.startswith(('"', "'")):
            # Quoted, though it is no string.
            return self.read_value(value, schema)
        if found is not None and isinstance(value, dict | list) and types & {"object", "array"}:
            return found
        return json.dumps(text, ensure_ascii=False)

    def is_undecided(self, begun: str, schema: Any) -> bool:
        """Whether a text that begins so may yet be read as something else than text."""
        types = self.types(schema, implied=True)
        if types <= _TEXT:
            return False
        begun = begun.strip()
        if "string" not in types or not begun:
            return True
        if begun[0] in "{[":
            return not types.isdisjoint(("object", "array"))
        if begun[0] == '"':
            return types == ALL
        if len(begun) > MAX_SCALAR:
            return False
        if any(word.startswith(begun) for kind, words in _SPELLINGS.items() if kind in types for word in words):
            return True
        return not types.isdisjoint(("number", "integer")) and _NUMBER_BEGUN.fullmatch(begun) is not None

    def _step(self, depth: int) -> bool:
        self._left -= 1
        return self._left > 0 and depth < _MAX_DEPTH

    def _walk(self, schema: Any, implied: bool, above: frozenset[str], depth: int) -> Types | None:
        """None for a schema that leads back to itself and says nothing else: a union goes by its other branches."""
        if isinstance(schema, bool):
            return ALL if schema else _NOTHING
        if not isinstance(schema, dict) or not self._step(depth):
            return ALL
        found = _own_types(schema, implied)
        in_circles = False
        parts = [(part, above) for part in _list(schema, "allOf")]
        reference = schema.get("$ref")
        if isinstance(reference, str):
            in_circles = reference in above
            if not in_circles:
                parts.append((self._resolve(reference), above | {reference}))
        for part, seen in parts:
            types = self._walk(part, implied, seen, depth + 1)
            in_circles |= types is None
            found = _both(found, types)
        for key in ("anyOf", "oneOf"):
            branches = [self._walk(part, implied, above, depth + 1) for part in _list(schema, key)]
            in_circles |= None in branches
            told = [types for types in branches if types is not None]
            if told:
                found = _both(found, _NOTHING.union(*told))
        if found is None:
            return None if in_circles else ALL
        return found | {"null"} if schema.get("nullable") is True else found

    def _admits(self, schema: Any, value: Any, depth: int) -> bool:
        if isinstance(schema, bool) or not isinstance(schema, dict) or not self._step(depth):
            return schema is not False
        if value is None and schema.get("nullable") is True:
            return True
        own = _own_types(schema, True)
        if own is not None and _kind(value) not in own:
            return False
        listed = _listed(schema)
        if listed is not None and not any(_kind(value) == _kind(item) and value == item for item in listed):
            return False
        if isinstance(reference := schema.get("$ref"), str) and not self._admits(
            self._resolve(reference), value, depth + 1
        ):
            return False
        if not all(self._admits(part, value, depth + 1) for part in _list(schema, "allOf")):
            return False
        unions = (_list(schema, "anyOf"), _list(schema, "oneOf"))
        return all(any(self._admits(part, value, depth + 1) for part in union) for union in unions if union)

    def _values(self, schema: Any, depth: int) -> list[Any] | None:
        if not isinstance(schema, dict) or not self._step(depth):
            return None
        found = _listed(schema)
        if found is None and isinstance(reference := schema.get("$ref"), str):
            found = self._values(self._resolve(reference), depth + 1)
        for part in _list(schema, "allOf"):
            found = self._values(part, depth + 1) if found is None else found
        for key in ("anyOf", "oneOf"):
            branches = [self._values(part, depth + 1) for part in _list(schema, key)]
            if found is None and branches and None not in branches:
                found = [value for branch in branches for value in branch or ()]
        if found is None:
            return None
        return found if schema.get("nullable") is not True else [*found, None]

    def _property(self, schema: Any, name: str, depth: int) -> Any:
        if not isinstance(schema, dict) or not self._step(depth):
            return True
        properties = schema.get("properties")
        if isinstance(properties, dict) and name in properties:
            return properties[name]
        for part in self._parts(schema):
            if (found := self._property(part, name, depth + 1)) is not True:
                return found
        rest = schema.get("additionalProperties")
        return rest if isinstance(rest, dict) else True

    def _items(self, schema: Any, depth: int) -> Any:
        if not isinstance(schema, dict) or not self._step(depth):
            return True
        items = schema.get("items")
        if isinstance(items, dict):
            return items
        return next(
            (found for part in self._parts(schema) if (found := self._items(part, depth + 1)) is not True), True
        )

    def _collect(self, schema: Any, found: dict[str, Any], depth: int) -> None:
        if not isinstance(schema, dict) or not self._step(depth):
            return
        properties = schema.get("properties")
        if isinstance(properties, dict):
            for name, inner in properties.items():
                found.setdefault(name, inner)
        for part in (self._resolve(schema.get("$ref")), *_list(schema, "allOf")):
            self._collect(part, found, depth + 1)

    def _parts(self, schema: dict[str, Any]) -> list[Any]:
        return [self._resolve(schema.get("$ref")), *(part for key in _UNIONS for part in _list(schema, key))]

    def _resolve(self, reference: Any) -> Any:
        """What a pointer into the root points at; True for any other reference."""
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            return True
        target = self._root
        for name in unquote(reference[2:]).split("/") if len(reference) > 1 else ():
            name = name.replace("~1", "/").replace("~0", "~")
            if isinstance(target, dict) and name in target:
                target = target[name]
            elif isinstance(target, list) and name.isdecimal() and len(name) < 7 and int(name) < len(target):
                target = target[int(name)]
            else:
                return True
        return target


_UNIONS = ("allOf", "anyOf", "oneOf")


def _list(schema: dict[str, Any], key: str) -> list[Any]:
    value = schema.get(key)
    return value if isinstance(value, list) else []


def _both(left: Types | None, right: Types | None) -> Types | None:
    if left is None or right is None:
        return right if left is None else left
    return left & right


def _listed(schema: dict[str, Any]) -> list[Any] | None:
    if "const" in schema:
        return [schema["const"]]
    values = schema.get("enum")
    return values if isinstance(values, list) and values else None


def _own_types(schema: dict[str, Any], implied: bool) -> Types | None:
    """What `type`, `const` and `enum` of the schema itself say."""
    found: Types | None = None
    given = schema.get("type")
    if isinstance(given, str | list):
        words = [given] if isinstance(given, str) else given
        found = _NOTHING.union(*map(_named, words)) or None
    if (listed := _listed(schema)) is not None:
        found = _both(found, frozenset(map(_kind, listed)))
    if found is None and implied:
        for name, keywords in _IMPLIED.items():
            if any(keyword in schema for keyword in keywords):
                return _named(name)
    return found


def _named(word: Any) -> Types:
    name = _WORDS.get(word.lower()) if isinstance(word, str) else None
    if name is None:
        return ALL
    return frozenset({"number", "integer"}) if name == "number" else frozenset({name})


def _kind(value: Any) -> str:
    """The type of a value of JSON; a whole number is an integer however it is written."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "integer" if isinstance(value, int) or value.is_integer() else "number"
    if isinstance(value, str):
        return "string"
    return "object" if isinstance(value, dict) else "array"


def _as_json(text: str, *, lenient: bool) -> str | None:
    """The text as JSON where it is JSON, or Python's words or containers for it.

    lenient: also other spellings of numbers and words; for where no text may stand.
    """
    if text in _PYTHON_WORDS:
        return _PYTHON_WORDS[text]
    begins_container = text.startswith(("{", "["))
    if not begins_container and not text.startswith('"') and len(text) > MAX_SCALAR:
        return None
    if is_json(text):
        return text
    if begins_container:
        return literal_as_json(text)
    if not lenient:
        return None
    if text.lower() in _PYTHON_WORDS.values():
        return text.lower()
    if text.startswith(("'", '"', "(")):
        return literal_as_json(text)
    for read in (int, float):
        try:
            number = read(text)
        except ValueError:
            continue
        return json.dumps(number) if math.isfinite(number) else None
    return None


def is_json(text: str) -> bool:
    """Whether it is a value of JSON; NaN and Infinity are none."""
    try:
        json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse(name: str) -> None:
    raise ValueError(name)


def literal_as_json(text: str) -> str | None:
    """A literal of Python as JSON; None for what is none, or has no JSON."""
    if len(text) > _MAX_LITERAL:
        return None
    try:
        with warnings.catch_warnings():
            # "\\d" is a string to Python, with a warning.
            warnings.simplefilter("ignore")
            value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    if not _is_plain(value):
        return None
    found = json.dumps(value, ensure_ascii=False)
    # Half of a surrogate pair cannot be sent but as an escape.
    return found if found.isascii() or not _SURROGATE.search(found) else json.dumps(value)


def _is_plain(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    return value is None or isinstance(value, str | bool | int)

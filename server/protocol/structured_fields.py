"""The fields that ask for structured output, under the names of OpenAI, vLLM and SGLang, as one GrammarSpec.

Pure: the spec is compiled by `GrammarCompiler.compile_async`, which also finds what is wrong inside of a schema.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import orjson

from engine.request import RequestError
from engine.text.grammar.spec import GrammarSpec, Kind
from server.protocol.body import Body, check_nesting, invalid
from server.protocol.ignored import ignore

_SCHEMA_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_FORMATS = ("text", "json_object", "json_schema", "structural_tag")
# This server has one engine for grammars; a client may ask for it or for none in particular.
BACKENDS = ("auto", "guidance", "llguidance")
# The others' engines, which hold an answer to the same.
OTHER_BACKENDS = ("xgrammar", "outlines", "lm-format-enforcer", "outlines_core")

Reader = Callable[[str, Any], GrammarSpec]


def read_grammar(body: Body) -> GrammarSpec | None:
    """The grammar that a request asks for, None for free text. Raises RequestError (400), also for two at once."""
    found: list[tuple[str, GrammarSpec]] = []
    if body.has("response_format"):
        spec = _read_response_format(body.object("response_format") or {})
        if spec is not None:
            found.append(("response_format", spec))
    if body.has("structured_outputs"):
        found.append(("structured_outputs", _read_structured_outputs(body.object("structured_outputs") or {})))
    backend = body.choice("guided_decoding_backend", (*BACKENDS, *OTHER_BACKENDS))
    if backend in OTHER_BACKENDS:
        ignore("guided_decoding_backend", backend)
    pattern = body.string("guided_whitespace_pattern", None, most=1024)
    for name, read in _TOP_LEVEL.items():
        # llama.cpp's clients send an empty grammar for none.
        says_none = (name.endswith("json_object") and body.raw(name) is False) or (
            name == "grammar" and body.raw(name) == ""
        )
        if body.has(name) and not says_none:
            spec = read(name, body.raw(name))
            found.append((name, replace(spec, whitespace_pattern=pattern) if name.startswith("guided_") else spec))
    if pattern is not None and not any(name.startswith("guided_") for name, _ in found):
        raise invalid("guided_whitespace_pattern", "needs a `guided_*` structure beside it")
    if len(found) > 1:
        raise invalid(found[1][0], f"and `{found[0][0]}` both ask for a structure; give one of them")
    return found[0][1] if found else None


def _read_response_format(fields: dict[str, Any]) -> GrammarSpec | None:
    where = "response_format"
    kind = fields.get("type")
    if isinstance(kind, str) and kind in _OTHER_FORMATS:
        field, read = _OTHER_FORMATS[kind]
        return read(f"{where}.{field}", fields.get(field))
    if kind not in _FORMATS:
        raise invalid(f"{where}.type", f"must be one of {', '.join(_FORMATS)}")
    if kind == "text":
        return None
    if kind == "structural_tag":
        return _structural_tag(where, fields)
    # Text Generation Inference calls it a value.
    schema: Any = fields.get("schema", fields.get("value") if kind == "json_object" else None)
    strict: Any = fields.get("strict")
    if kind == "json_object":
        # llama.cpp's clients put a schema beside it.
        return GrammarSpec("json_object", param=where) if schema is None else _schema(f"{where}.schema", schema)
    if (inner := fields.get("json_schema")) is not None:
        where = f"{where}.json_schema"
        if not isinstance(inner, dict):
            raise invalid(where, "must be an object with a `schema`")
        name = inner.get("name")
        if name is not None and not (isinstance(name, str) and _SCHEMA_NAME.fullmatch(name)):
            raise invalid(f"{where}.name", "must have 1 to 64 letters, digits, dashes or underscores")
        if not isinstance(inner.get("description"), str | None):
            raise invalid(f"{where}.description", "must be a string")
        schema, strict = inner.get("schema"), inner.get("strict")
    if schema is None:
        raise invalid("response_format.json_schema", "must be an object with a `schema`")
    if not isinstance(strict, bool | None):
        raise invalid(f"{where}.strict", "must be true or false")
    # OpenAI promises nothing for a schema that is not strict; what can be enforced is enforced all the same.
    return replace(_schema(f"{where}.schema", schema), strict=bool(strict))


def _read_structured_outputs(fields: dict[str, Any]) -> GrammarSpec:
    where = "structured_outputs"
    options = Body({f"{where}.{name}": value for name, value in fields.items()})
    given = [name for name in _STRUCTURED if options.has(f"{where}.{name}")]
    if "json_object" in given and not options.boolean(f"{where}.json_object", False):
        given.remove("json_object")
    if len(given) != 1:
        raise invalid(where, f"must have exactly one of {', '.join(_STRUCTURED)}")
    if options.boolean(f"{where}.disable_additional_properties", False):
        raise invalid(f"{where}.disable_additional_properties", "is not supported by this server")
    spec = _STRUCTURED[given[0]](f"{where}.{given[0]}", fields[given[0]])
    return replace(
        spec,
        any_whitespace=not options.boolean(f"{where}.disable_any_whitespace", False),
        whitespace_pattern=options.string(f"{where}.whitespace_pattern", None, most=1024),
    )


def _object(where: str, value: Any) -> GrammarSpec:
    if value is not True:
        raise invalid(where, "must be true or false")
    return GrammarSpec("json_object", param=where)


def _schema(where: str, value: Any) -> GrammarSpec:
    """A schema as an object, or as a string of JSON."""
    return GrammarSpec("json_schema", _json_text(where, value), param=where)


def _json_text(where: str, value: Any) -> str:
    if isinstance(value, str):
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError as error:
            raise invalid(where, f"is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise invalid(where, "must be an object, or a string of its JSON")
    check_nesting(where, value)
    return orjson.dumps(value).decode()


def _choice(where: str, value: Any) -> GrammarSpec:
    if not isinstance(value, list) or not value or not all(isinstance(item, str) and item for item in value):
        raise invalid(where, "must be a list of non-empty strings, at least one")
    return GrammarSpec("choice", orjson.dumps(value).decode(), param=where)


def _text(kind: Kind) -> Reader:
    def read(where: str, value: Any) -> GrammarSpec:
        if not isinstance(value, str) or not value:
            raise invalid(where, "must be a non-empty string")
        return GrammarSpec(kind, value, param=where)

    return read


def _structural_tag(where: str, value: Any) -> GrammarSpec:
    """The current shape, `{"format": {...}}`, or the older one of triggers and structures."""
    if isinstance(value, str):
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError as error:
            raise invalid(where, f"is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise invalid(where, "must be an object, or a string of its JSON")
    check_nesting(where, value)
    if "format" in value:
        tree = value["format"]
    elif "structures" in value:
        tree = _older_tags(where, value)
    else:
        raise invalid(where, "must have a `format`")
    return GrammarSpec("structural_tag", orjson.dumps(tree).decode(), param=where)


def _older_tags(where: str, value: dict[str, Any]) -> dict[str, Any]:
    structures = value["structures"]
    if not isinstance(structures, list) or not all(isinstance(item, dict) for item in structures):
        raise invalid(f"{where}.structures", "must be a list of objects")
    tags = [
        {
            "begin": item.get("begin"),
            "content": {"type": "json_schema", "json_schema": item.get("schema") or {}},
            "end": item.get("end", ""),
        }
        for item in structures
    ]
    return {"type": "triggered_tags", "triggers": value.get("triggers"), "tags": tags}


_STRUCTURED: dict[str, Reader] = {
    "json": _schema,
    "regex": _text("regex"),
    "choice": _choice,
    "grammar": _text("grammar"),
    "json_object": _object,
    "structural_tag": _structural_tag,
}
# Text Generation Inference's formats, and Fireworks'.
_OTHER_FORMATS: dict[str, tuple[str, Reader]] = {
    "json": ("value", _schema),
    "regex": ("value", _text("regex")),
    "grammar": ("grammar", _text("grammar")),
}
# vLLM's older names, SGLang's and llama.cpp's.
_TOP_LEVEL: dict[str, Reader] = {
    "guided_json": _schema,
    "guided_regex": _text("regex"),
    "guided_choice": _choice,
    "guided_grammar": _text("grammar"),
    "guided_json_object": _object,
    "json_schema": _schema,
    "regex": _text("regex"),
    "ebnf": _text("grammar"),
    # llama.cpp's, which has `json_schema` as well.
    "grammar": _text("grammar"),
    "structural_tag": _structural_tag,
}
# All that is read here.
FIELDS = frozenset(
    ["response_format", "structured_outputs", "guided_decoding_backend", "guided_whitespace_pattern", *_TOP_LEVEL]
)


def with_calls(spec: GrammarSpec, calls: dict[str, Any]) -> GrammarSpec:
    """The structure, or calls of tools instead: what `response_format` means when tools may be called.

    calls: the structural tag of a family's calls, whose schemas say each how strict it is. Raises RequestError for a
    structure that cannot stand beside calls.
    """
    tree: dict[str, Any]
    if spec.kind == "json_object":
        tree = {"type": "json_schema", "json_schema": {"type": "object"}}
    elif spec.kind == "json_schema":
        tree = {"type": "json_schema", "json_schema": orjson.loads(spec.text)}
        tree |= {"strict": spec.strict, "name": spec.param}
    elif spec.kind == "structural_tag":
        tree = orjson.loads(spec.text)
    elif spec.kind == "choice":
        values = orjson.loads(spec.text)
        tree = {"type": "or", "elements": [{"type": "const_string", "value": value} for value in values]}
    elif spec.kind == "regex":
        tree = {"type": "regex", "pattern": spec.text}
    elif spec.kind == "grammar":
        tree = {"type": "grammar", "grammar": spec.text}
    else:
        raise RequestError("This structure cannot be combined with tools.", param=spec.param)
    return replace(spec, kind="structural_tag", text=orjson.dumps({"type": "or", "elements": [tree, calls]}).decode())

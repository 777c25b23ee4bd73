"""The words that the OpenAPI document is written in: a schema or a route by one call. Pure.

`about` is what a reader is told. The null of JSON is an absent field everywhere, as in protocol/body.py.
"""

from __future__ import annotations

from typing import Any

from engine.request import MAX_TOP_LOGPROBS

Json = dict[str, Any]


def integer(low: int | None = None, high: int | None = None, about: str = "") -> Json:
    return _limited("integer", {"minimum": low, "maximum": high}, about)


def alternatives(about: str = "") -> Json:
    """Beside each token."""
    return integer(0, about=f"At most --max-logprobs, {MAX_TOP_LOGPROBS} unless set. {about}".rstrip())


def number(low: float | None = None, high: float | None = None, about: str = "", *, above: bool = False) -> Json:
    """above: `low` itself is excluded."""
    return _limited("number", {"exclusiveMinimum" if above else "minimum": low, "maximum": high}, about)


def string(about: str = "", *, least: int | None = None, most: int | None = None) -> Json:
    return _limited("string", {"minLength": least, "maxLength": most}, about)


def boolean(about: str = "") -> Json:
    return _limited("boolean", {}, about)


def array(items: Json, about: str = "", *, least: int | None = None, most: int | None = None) -> Json:
    return _limited("array", {"items": items, "minItems": least, "maxItems": most}, about)


def mapping(values: Json, about: str = "") -> Json:
    """An object with keys of the client's choice."""
    return _limited("object", {"additionalProperties": values}, about)


def constant(*values: object, about: str = "") -> Json:
    return {"enum": list(values)} | ({"description": about} if about else {})


def either(*schemas: Json, about: str = "") -> Json:
    return {"anyOf": list(schemas)} | ({"description": about} if about else {})


def ref(name: str) -> Json:
    """One of a family's SCHEMAS."""
    return {"$ref": f"#/components/schemas/{name}"}


def takes(required: Json, optional: Json | None = None, about: str = "") -> Json:
    """What a client sends: a null is an absent field, and fields that are not known are not looked at."""
    fields = required | {name: either(schema, {"type": "null"}) for name, schema in (optional or {}).items()}
    return _limited("object", {"required": list(required) or None, "properties": fields}, about)


def gives(required: Json, optional: Json | None = None, about: str = "") -> Json:
    """What the server answers: these fields and no others; the optional ones only where they were asked for."""
    fields = required | (optional or {})
    return _limited(
        "object", {"required": list(required) or None, "properties": fields, "additionalProperties": False}, about
    )


def refused(refusals: dict[str, tuple[object, ...]]) -> Json:
    """Fields that clients know and this server does not honour: with the values that ask for nothing."""
    return {name: constant(*neutral, about="Not supported.") if neutral else NULL for name, neutral in refusals.items()}


def _limited(kind: str, limits: Json, about: str) -> Json:
    schema = {"type": kind} | {name: value for name, value in limits.items() if value is not None}
    return schema | ({"description": about} if about else {})


NULL: Json = {"type": "null"}
ANYTHING: Json = {}
OBJECT: Json = {"type": "object"}


# ---- routes


def get(
    summary: str,
    answer: Json | str | None,
    *,
    kind: str = "application/json",
    query: Json | None = None,
    error: str = "Error",
) -> Json:
    """A route without a body. answer: its schema, the name of one, or None for an empty answer.

    query: schemas of the parameters behind the "?". error: the name of the schema of what goes wrong.
    """
    return {"get": _operation(summary, {} if answer is None else {kind: _media(answer)}, error, query)}


def delete(summary: str, answer: Json | str | None, *, error: str = "Error") -> Json:
    """A route that takes something away; see get."""
    return {"delete": _operation(summary, {} if answer is None else {"application/json": _media(answer)}, error)}


def post(
    summary: str,
    request: Json | str | None,
    answer: Json | str | None,
    *,
    examples: tuple[Json, ...] = (),
    streamed: Json | None = None,
    query: Json | None = None,
    error: str = "Error",
    may_be_empty: bool = False,
) -> Json:
    """A route that reads a JSON object, or nothing. request, answer: schemas or names of them. may_be_empty: no body
    is one of no fields.

    examples: good bodies; the tests send each of them, and between them they must make it read every field.
    streamed: by `events`, `named_events` or `lines`.
    """
    content: Json = {} if answer is None else {"application/json": _media(answer)}
    operation = _operation(summary, content | (streamed or {}), error, query)
    if request is not None:
        body = _media(request)
        body["examples"] = {f"example {index}": {"value": value} for index, value in enumerate(examples, 1)}
        operation["requestBody"] = {"required": not may_be_empty, "content": {"application/json": body}}
    return {"post": operation}


def events(name: str) -> Json:
    """A stream of events `data: <JSON>` of one schema, and a last one that says [DONE]."""
    data = either(_content(name), constant("[DONE]"))
    return {"text/event-stream": {"schema": takes({"data": data}, about="One event.")}}


def plain_events(name: str) -> Json:
    """A stream of events of one schema, and nothing behind them."""
    return {"text/event-stream": {"schema": takes({"data": _content(name)}, about="One event.")}}


def named_events(name: str) -> Json:
    """A stream of events that have a name each, which is also the `type` in their data."""
    return {"text/event-stream": {"schema": takes({"event": string(), "data": _content(name)}, about="One event.")}}


def lines(name: str) -> Json:
    """A stream of JSON objects, one in a line."""
    return {"application/x-ndjson": _media(name)}


def _content(name: str) -> Json:
    return string() | {"contentMediaType": "application/json", "contentSchema": ref(name)}


def _media(schema: Json | str) -> Json:
    return {"schema": ref(schema) if isinstance(schema, str) else schema}


def _operation(summary: str, content: Json, error: str, query: Json | None = None) -> Json:
    failed = {"description": "An error.", "content": {"application/json": _media(error)}}
    answered: Json = {"description": "The answer."} | ({"content": content} if content else {})
    operation: Json = {"summary": summary, "responses": {"200": answered, "4XX": failed, "5XX": failed}}
    if query:
        operation["parameters"] = [{"name": name, "in": "query", "schema": schema} for name, schema in query.items()]
    return operation

"""Pieces of structural tags, from which each family puts together the grammar that forces its calls."""

from __future__ import annotations

import json
from typing import Any

Format = dict[str, Any]


def const(text: str) -> Format:
    return {"type": "const_string", "value": text}


def sequence(*elements: Format) -> Format:
    return {"type": "sequence", "elements": list(elements)}


def either(*elements: Format) -> Format:
    return {"type": "or", "elements": list(elements)}


def schema_of(schema: Any) -> Format:
    return {"type": "json_schema", "json_schema": schema}


def json_call(before: str, name: str, arguments_key: str, schema: dict[str, Any], after: str) -> Format:
    """A tag for one call as an object of name and arguments."""
    begin = f'{before}{{"name": {json.dumps(name)}, "{arguments_key}": '
    return {"type": "tag", "begin": begin, "content": schema_of(schema), "end": "}" + after}


def tags(calls: list[Format], separator: str, parallel: bool) -> Format:
    """One of the calls, or several where that is allowed."""
    return {
        "type": "tags_with_separator",
        "tags": calls,
        "separator": separator,
        "at_least_one": True,
        "stop_after_first": not parallel,
    }


def optional_fields(required: list[Format], optional: list[Format], separator: Format) -> Format:
    """Required fields in order, then any of the optional ones in order, with a separator between neighbours."""
    parts: list[Format] = []
    for field in required:
        parts += [separator, field] if parts else [field]
    nothing = const("")
    if parts:
        return sequence(*parts, *(either(nothing, sequence(separator, field)) for field in optional))
    if not optional:
        return nothing
    # Without a required one, whichever comes first goes without separator.
    starts = [
        sequence(first, *(either(nothing, sequence(separator, field)) for field in optional[index + 1 :]))
        for index, first in enumerate(optional)
    ]
    return either(nothing, *starts)

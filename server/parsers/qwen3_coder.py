"""Tool calls of Qwen3-Coder and later Qwen: `<function=name><parameter=key>value</parameter></function>` in a tag.

Values are bare text; what they are in JSON is looked up in the tool's declaration. One goes out when it is complete.
"""

from __future__ import annotations

import json
import re
from typing import Any

from server.parsers.base import Malformed, Scanner, Steps, ToolFamily
from server.parsers.formats import Format, const, either, schema_of, sequence, tags

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_FUNCTION, _FUNCTION_END = "<function=", "</function>"
_PARAMETER, _PARAMETER_END = "<parameter=", "</parameter>"
_NAME = re.compile(r"[^<>\s]")
_MAX_VALUE = 1 << 20


def _run(scanner: Scanner) -> Steps[None]:
    while marker := (yield from scanner.until((_OPEN, _FUNCTION), scanner.content)):
        try:
            if marker == _OPEN:
                yield from scanner.space()
                yield from scanner.expect(_FUNCTION)
            yield from _read_call(scanner)
            yield from scanner.accept(_CLOSE, spaced=True)
        except Malformed:
            scanner.fail()


def _read_call(scanner: Scanner) -> Steps[None]:
    name = yield from scanner.word(_NAME)
    yield from scanner.expect(">")
    types = _types(scanner.tools.get(name) if scanner.tools is not None else None)
    started = False
    while not (yield from scanner.accept(_FUNCTION_END, spaced=True)):
        yield from scanner.space()
        yield from scanner.expect(_PARAMETER)
        key = yield from scanner.word(_NAME)
        yield from scanner.expect(">")
        value, _ = yield from scanner.raw_until((_PARAMETER_END,), _MAX_VALUE)
        if not started:
            scanner.start_call(name)
        text = json.dumps(key, ensure_ascii=False) + ": " + _as_json(value, types.get(key))
        scanner.arguments((", " if started else "{") + text)
        started = True
    if not started:
        scanner.start_call(name)
    scanner.arguments("}" if started else "{}")
    scanner.end_call()


def _types(parameters: Any) -> dict[str, Any]:
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    return properties if isinstance(properties, dict) else {}


def _as_json(value: str, schema: Any) -> str:
    # The tags stand on lines of their own.
    value = value.removeprefix("\n").removesuffix("\n")
    if _is_text(schema):
        return json.dumps(value, ensure_ascii=False)
    try:
        json.loads(value, parse_constant=_refuse)
        return value.strip()
    except (ValueError, RecursionError):
        # Python's words for them are common too.
        word = {"True": "true", "False": "false", "None": "null"}.get(value.strip())
        return word or json.dumps(value, ensure_ascii=False)


def _refuse(name: str) -> None:
    raise ValueError(name)


def _is_text(schema: Any) -> bool:
    """Whether a parameter is a string; one that was not declared is JSON where it can be."""
    if not isinstance(schema, dict):
        return False
    if schema.get("type") == "string":
        return True
    values = schema.get("enum")
    return isinstance(values, list) and bool(values) and all(isinstance(value, str) for value in values)


def _call_format(tools: list[tuple[str, dict[str, Any]]], parallel: bool) -> dict[str, Any]:
    calls = [
        {
            "type": "tag",
            "begin": f"{_OPEN}\n{_FUNCTION}{name}>\n",
            "content": _parameters(schema),
            "end": f"{_FUNCTION_END}\n{_CLOSE}",
        }
        for name, schema in tools
    ]
    return tags(calls, "\n", parallel)


def _parameters(schema: dict[str, Any]) -> Format:
    types, required = _types(schema), schema.get("required")
    definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    parts: list[Format] = []
    for name, inner in types.items():
        if re.search(r"[<>\s]", name):
            continue
        end = const(f"\n{_PARAMETER_END}\n")
        values = inner.get("enum") if isinstance(inner, dict) else None
        value: Format
        if _is_text(inner) and isinstance(values, list):
            value = sequence(either(*map(const, values)), end)
        elif _is_text(inner):
            value = sequence({"type": "any_text"}, end)
        else:
            value = sequence(schema_of({**inner, **definitions} if isinstance(inner, dict) else inner), end)
        part = sequence(const(f"{_PARAMETER}{name}>\n"), value)
        must = isinstance(required, list) and name in required
        parts.append(part if must else either(const(""), part))
    return sequence(*parts) if parts else const("")


FAMILY = ToolFamily("qwen3_coder", _run, (_OPEN, _CLOSE), _call_format)

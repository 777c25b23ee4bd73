"""Tool calls of Llama 3: the whole output is `{"name": ..., "parameters": {...}}`, several with `;` between them.

Also behind `<|python_tag|>`, anywhere in the text.
"""

from __future__ import annotations

from typing import Any

from server.parsers.base import SPACE, Malformed, Scanner, Steps, ToolFamily
from server.parsers.formats import json_call, tags
from server.parsers.json_text import read_call_object

_TAG = "<|python_tag|>"


def _run(scanner: Scanner) -> Steps[None]:
    character, distance = yield from scanner.look_past(SPACE)
    if character == "{":
        scanner.content(scanner.text[scanner.at : scanner.at + distance])
        scanner.skip(distance)
        scanner.begin()
        yield from _read_calls(scanner)
    while (yield from scanner.until((_TAG,), scanner.content)):
        yield from _read_calls(scanner)


def _read_calls(scanner: Scanner) -> Steps[None]:
    """Calls one behind the other; the first has been begun."""
    try:
        yield from scanner.space()
        yield from read_call_object(scanner, only_known_keys=True)
        while True:
            character, distance = yield from scanner.look_past(SPACE + ";,")
            if character != "{":
                return
            scanner.begin()
            scanner.skip(distance)
            yield from read_call_object(scanner, only_known_keys=True)
    except Malformed:
        scanner.fail()


def _call_format(tools: list[tuple[str, dict[str, Any]]], parallel: bool) -> dict[str, Any]:
    return tags([json_call("", name, "parameters", schema, "") for name, schema in tools], "; ", parallel)


FAMILY = ToolFamily("llama3_json", _run, (_TAG,), _call_format, marked=False)

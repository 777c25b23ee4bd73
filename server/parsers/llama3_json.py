"""Tool calls of Llama 3: the output is `{"name": ..., "parameters": {...}}`, several with `;` between them.

Behind `<|python_tag|>`, anywhere in the text, also as Python: `f(x=1)`, or `f.call(x=1)` for the tools that these
models were trained with, or code for a tool that runs it; and as `<function=f>{"x": 1}</function>`, which prompts for
them ask for. Text may stand before an object that names a declared tool.
"""

from __future__ import annotations

import json
from typing import Any

from engine.text.schema_types import SchemaTypes
from server.parsers.base import SPACE, Malformed, Scanner, Steps, ToolFamily
from server.parsers.call_objects import NAME_CHARACTERS, read_call_list, read_call_object
from server.parsers.formats import json_call, tags
from server.parsers.json_text import json_escaped
from server.parsers.pythonic import read_python_call
from server.parsers.qwen3_coder import TAGS
from server.parsers.tagged import read_tagged_call

_TAG = "<|python_tag|>"
_FENCE = "```"
_SEPARATORS = SPACE + ";,"
# Tools to which code is given as it is.
_INTERPRETERS = ("python", "ipython", "code_interpreter")


def _run(scanner: Scanner) -> Steps[None]:
    character, distance = yield from scanner.look_past(SPACE)
    if character in ("{", "[", "`"):
        scanner.content(scanner.text[scanner.at : scanner.at + distance])
        scanner.skip(distance)
        scanner.begin()
        is_call = yield from _read_first(scanner)
    else:
        is_call = True
    # An object that is no call says that this answer has others.
    begins = (_TAG, *TAGS.calls)
    while marker := (yield from scanner.until((*begins, "{") if is_call else begins, scanner.content)):
        if marker == _TAG:
            yield from _read_behind_tag(scanner)
        elif marker in TAGS.calls:
            try:
                yield from read_tagged_call(scanner, TAGS, marker, declared=True)
            except Malformed:
                scanner.fail()
        else:
            scanner.skip(-1)
            is_call = yield from _read_calls(scanner, declared=True)


def _read_first(scanner: Scanner) -> Steps[bool]:
    """What the output begins with; returns whether it is a call."""
    fenced = yield from scanner.accept(_FENCE)
    if fenced:
        yield from scanner.accept("json")
        yield from scanner.space()
    is_call = yield from _read_calls(scanner, declared=fenced)
    if is_call and fenced:
        yield from scanner.accept(_FENCE, spaced=True)
    return is_call


def _read_calls(scanner: Scanner, *, declared: bool = False) -> Steps[bool]:
    """Calls one behind the other; the first has been begun. Returns whether it is one."""
    before = scanner.num_calls
    try:
        if (yield from scanner.space()) == "[":
            yield from read_call_list(scanner, (), unmarked=True)
            return True
        yield from read_call_object(scanner, only_known_keys=True, declared=declared)
        while True:
            character, distance = yield from scanner.look_past(_SEPARATORS)
            if character != "{":
                break
            scanner.begin()
            scanner.skip(distance)
            yield from read_call_object(scanner, only_known_keys=True, declared=declared)
    except Malformed:
        scanner.fail()
    return scanner.num_calls > before


def _read_behind_tag(scanner: Scanner) -> Steps[None]:
    """Calls as JSON or Python, or code; the first has been begun."""
    character = yield from scanner.space()
    following = "" if character != "[" else (yield from scanner.look_past(SPACE, 1))[0]
    if character == "{" or following == "{":
        yield from _read_calls(scanner)
        return
    try:
        if character == "[":
            scanner.skip(1)
            yield from scanner.space()
        elif not (yield from _is_call(scanner, 0)):
            yield from _read_code(scanner)
            return
        while True:
            yield from read_python_call(scanner)
            character, distance = yield from scanner.look_past(_SEPARATORS)
            if character == "]":
                scanner.skip(distance + 1)
                return
            if not (yield from _is_call(scanner, distance)):
                return
            scanner.begin()
            scanner.skip(distance)
    except Malformed:
        scanner.fail()


def _is_call(scanner: Scanner, distance: int) -> Steps[bool]:
    """Whether the name of a declared tool and a bracket stand so far away."""
    character, end = yield from scanner.look_past(NAME_CHARACTERS, distance)
    name = scanner.text[scanner.at + distance : scanner.at + end]
    return character == "(" and (scanner.is_declared(name) or scanner.is_declared(name.removesuffix(".call")))


def _read_code(scanner: Scanner) -> Steps[None]:
    """Code up to the end, where a declared tool takes some."""
    name = next((name for name in _INTERPRETERS if scanner.is_declared(name)), "")
    types = SchemaTypes(scanner.parameters(name))
    texts = [key for key, inner in types.properties().items() if "string" in types.types(inner)]
    key = "code" if "code" in texts else next(iter(texts), "")
    if not key or not (yield from scanner.peek()):
        raise Malformed
    scanner.start_call(name)
    scanner.arguments(f'{{{json.dumps(key)}: "')
    yield from scanner.before((_TAG,), lambda text: scanner.arguments(json_escaped(text)))
    if not scanner.cut:
        scanner.arguments('"}')
    scanner.end_call()


def _call_format(tools: list[tuple[str, dict[str, Any]]], parallel: bool) -> dict[str, Any]:
    return tags([json_call("", name, "parameters", schema, "") for name, schema in tools], "; ", parallel)


FAMILY = ToolFamily("llama3_json", _run, (_TAG,), _call_format, marked=False)

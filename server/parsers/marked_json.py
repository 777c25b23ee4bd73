"""Calls as JSON behind a mark: a list of objects, or one object, of name and arguments, up to a mark that ends them.

Granite 3, Phi-4-mini, Hunyuan A13B, MiniMax M1, Jamba, Apriel, Nemotron Nano 2, Command, InternLM 2, LongCat,
GigaChat 3 and xLAM differ in their marks and the names of the fields; Apertus has the tool's name as the only key of
the object.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from server.parsers.base import SPACE, Malformed, Scanner, Steps, ToolFamily
from server.parsers.call_objects import close_call, read_call_list, read_call_object
from server.parsers.formats import Format, const, json_call, schema_of, sequence, tags
from server.parsers.json_text import read_arguments, read_json_string
from server.parsers.tagged import drop_begun

_Reader = Callable[[Scanner, tuple[str, ...]], Steps[None]]


def _read_calls(scanner: Scanner, ends: tuple[str, ...]) -> Steps[None]:
    if (yield from scanner.space()) == "[":
        yield from read_call_list(scanner, ends)
        return
    while True:
        yield from read_call_object(scanner, ends)
        # Several, one below the other.
        character, distance = yield from scanner.look_past(SPACE + ",;")
        if character != "{":
            return
        scanner.begin()
        scanner.skip(distance)


def _listed(
    name: str,
    begin: str,
    end: str,
    *,
    also: tuple[str, ...] = (),
    fields: tuple[str, str] = ("name", "arguments"),
    list_of: tuple[str, str] | None = ("[", "]"),
    between: str = ", ",
    extra: str = "",
    markers: tuple[str, ...] | None = None,
    wrap: tuple[str, ...] = (),
    eos: str = "",
) -> ToolFamily:
    """A family with these marks. also: other marks that begin calls. fields: the keys of name and arguments.

    list_of: what is written around the calls and brackets; None for a mark around each call. between: between calls
    inside of it. extra: fields that are written in front of the name. eos: the end of the message, behind the calls.
    """
    begins = (begin.strip(), *also)
    closer = end.strip() or eos
    ends = tuple(filter(None, (closer, *begins)))

    def run(scanner: Scanner) -> Steps[None]:
        while (yield from scanner.until(begins, scanner.content)):
            try:
                yield from _read_calls(scanner, ends)
                if closer:
                    yield from close_call(scanner, closer)
                    drop_begun(scanner, (closer,))
            except Malformed:
                scanner.fail()

    def call_format(tools: list[tuple[str, dict[str, Any]]], parallel: bool) -> Format:
        before, after = ("", "") if list_of else (begin, end)
        calls = [_one(before, extra, fields, tool, schema, after) for tool, schema in tools]
        if list_of is None:
            return tags(calls, "\n", parallel)
        return sequence(const(begin + list_of[0]), tags(calls, between, parallel), const(list_of[1] + end))

    kept = (begin.strip(), end.strip(), *also) if markers is None else markers
    return ToolFamily(name, run, tuple(filter(None, kept)), call_format, wrap=wrap)


def _one(before: str, extra: str, fields: tuple[str, str], name: str, schema: dict[str, Any], after: str) -> Format:
    begin = f'{before}{{{extra}"{fields[0]}": {json.dumps(name)}, "{fields[1]}": '
    return {"type": "tag", "begin": begin, "content": schema_of(schema), "end": "}" + after}


GRANITE = _listed("granite", "<|tool_call|>", "", also=("<tool_call>",))
GRANITE_20B = _listed("granite-20b-fc", "<function_call> ", "", list_of=None)
PHI4_MINI = _listed("phi4_mini_json", "functools", "", markers=())
HUNYUAN_A13B = _listed("hunyuan_a13b", "<tool_calls>", "</tool_calls>")
MINIMAX_M1 = _listed("minimax", "<tool_calls>\n", "\n</tool_calls>", list_of=("", ""), between="\n")
JAMBA = _listed("jamba", "<tool_calls>", "</tool_calls>", list_of=("[\n    ", "\n]"))
NEMOTRON_V2 = _listed("nemotron_json", "<TOOLCALL>", "</TOOLCALL>")
COMMAND = _listed(
    "cohere_command3",
    "<|START_ACTION|>",
    "<|END_ACTION|>",
    fields=("tool_name", "parameters"),
    list_of=("[\n    ", "\n]"),
    extra='"tool_call_id": "0", ',
    wrap=("<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_TEXT|>", "<|END_TEXT|>"),
)
INTERNLM = _listed(
    "internlm",
    "<|action_start|><|plugin|>\n",
    "<|action_end|>",
    fields=("name", "parameters"),
    list_of=None,
    markers=("<|action_start|>", "<|plugin|>", "<|action_end|>"),
)
LONGCAT = _listed("longcat", "<longcat_tool_call>\n", "\n</longcat_tool_call>", list_of=None)
# A message of the role "function call"; a text may stand in one of its own before it.
GIGACHAT3 = _listed(
    "gigachat3",
    "function call<|role_sep|>\n",
    "",
    also=("<|function_call|>",),
    list_of=None,
    markers=("<|role_sep|>", "<|message_sep|>", "<|function_call|>"),
    wrap=("<|message_sep|>", "assistant<|role_sep|>\n"),
    eos="<|message_sep|>",
)


# Apertus: [{"get_weather": {"city": "Paris"}}, {"now": {}}].

_PREFIX, _SUFFIX = "<|tools_prefix|>", "<|tools_suffix|>"


def _run_apertus(scanner: Scanner) -> Steps[None]:
    ends = (_SUFFIX, _PREFIX)
    while (yield from scanner.until((_PREFIX,), scanner.content)):
        try:
            yield from scanner.space()
            yield from scanner.expect("[")
            if (yield from scanner.space()) != "{":
                raise Malformed
            while (yield from scanner.space()) == "{":
                scanner.skip(1)
                yield from _read_keyed(scanner, ends)
                yield from scanner.accept(",", spaced=True)
            yield from scanner.accept("]", spaced=True)
            yield from close_call(scanner, _SUFFIX)
            drop_begun(scanner, (_SUFFIX,))
        except Malformed:
            scanner.fail()


def _read_keyed(scanner: Scanner, ends: tuple[str, ...]) -> Steps[None]:
    """The rest of an object whose only key is the name."""
    yield from scanner.space()
    name = yield from read_json_string(scanner)
    yield from scanner.space()
    yield from scanner.expect(":")
    if (yield from scanner.space()) != "{":
        raise Malformed
    scanner.start_call(name)
    yield from read_arguments(scanner, scanner.arguments, ends, outer="}]")
    scanner.end_call()
    yield from scanner.accept("}", spaced=True)


def _apertus_format(tools: list[tuple[str, dict[str, Any]]], parallel: bool) -> Format:
    calls: list[Format] = [
        {"type": "tag", "begin": f"{{{json.dumps(name)}: ", "content": schema_of(schema), "end": "}"}
        for name, schema in tools
    ]
    return sequence(const(_PREFIX + "["), tags(calls, ", ", parallel), const("]" + _SUFFIX))


APERTUS = ToolFamily("apertus", _run_apertus, (_PREFIX, _SUFFIX), _apertus_format)


# Command R and R+ before R7B: Action: ```json [{"tool_name": ..., "parameters": {...}}] ```. The mark is a word of any
# text, so that only a list of calls behind it makes one of it.

_ACTION, _FENCE = "Action:", "```"


def _run_action(scanner: Scanner) -> Steps[None]:
    while (yield from scanner.until((_ACTION,), scanner.content)):
        try:
            yield from scanner.accept(_FENCE, spaced=True)
            yield from scanner.accept("json", spaced=True)
            yield from scanner.space()
            yield from read_call_list(scanner, (_FENCE, _ACTION))
            yield from close_call(scanner, _FENCE)
            drop_begun(scanner, (_FENCE,))
        except Malformed:
            scanner.fail()


def _action_format(tools: list[tuple[str, dict[str, Any]]], parallel: bool) -> Format:
    calls = [_one("", "", ("tool_name", "parameters"), name, schema, "") for name, schema in tools]
    begin = const(f"{_ACTION} {_FENCE}json\n[\n    ")
    return sequence(begin, tags(calls, ",\n    ", parallel), const(f"\n]{_FENCE}"))


COMMAND_R = ToolFamily("command_r", _run_action, (), _action_format)


# xLAM: the list is the whole output, or stands in a fence or behind one of the marks of the models it was made from.

_XLAM_BEGINS = ("[TOOL_CALLS]", "<tool_call>", "```")
_XLAM_ENDS = ("```", "</tool_call>")


def _run_xlam(scanner: Scanner) -> Steps[None]:
    character, distance = yield from scanner.look_past(SPACE)
    if character in ("[", "{"):
        scanner.content(scanner.text[scanner.at : scanner.at + distance])
        scanner.skip(distance)
        scanner.begin()
        yield from _read_xlam(scanner)
    while (yield from scanner.until(_XLAM_BEGINS, scanner.content)):
        yield from _read_xlam(scanner)


def _read_xlam(scanner: Scanner) -> Steps[None]:
    """The list or object; what is none is content."""
    try:
        yield from scanner.accept("json")
        if (yield from scanner.space()) == "[":
            scanner.skip(1)
            yield from scanner.space()
        while True:
            yield from read_call_object(scanner, only_known_keys=True)
            character, distance = yield from scanner.look_past(SPACE + ",")
            if character != "{":
                break
            scanner.begin()
            scanner.skip(distance)
        yield from scanner.accept("]", spaced=True)
        for end in _XLAM_ENDS:
            yield from scanner.accept(end, spaced=True)
    except Malformed:
        scanner.fail()


def _xlam_format(tools: list[tuple[str, dict[str, Any]]], parallel: bool) -> Format:
    calls = [json_call("", name, "arguments", schema, "") for name, schema in tools]
    return sequence(const("["), tags(calls, ", ", parallel), const("]"))


XLAM = ToolFamily("xlam", _run_xlam, ("<tool_call>", "</tool_call>", "[TOOL_CALLS]"), _xlam_format)

FAMILIES = (
    GRANITE,
    GRANITE_20B,
    PHI4_MINI,
    HUNYUAN_A13B,
    MINIMAX_M1,
    JAMBA,
    NEMOTRON_V2,
    COMMAND,
    COMMAND_R,
    INTERNLM,
    LONGCAT,
    GIGACHAT3,
    APERTUS,
    XLAM,
)

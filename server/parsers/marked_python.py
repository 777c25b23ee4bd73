"""Calls as Python between marks: LFM2's list `[f(a="x"), g()]`, and OLMo 3's calls on lines of their own."""

from __future__ import annotations

from typing import Any

from server.parsers.base import SPACE, Malformed, Scanner, Steps, ToolFamily
from server.parsers.call_objects import close_call, read_call_list, read_call_object
from server.parsers.formats import Format, const, sequence, tags
from server.parsers.pythonic import python_call, read_python_call
from server.parsers.tagged import drop_begun

_SEPARATORS = SPACE + ",;"


def _family(name: str, begin: str, end: str, *, around: tuple[str, str], separator: str) -> ToolFamily:
    def run(scanner: Scanner) -> Steps[None]:
        while (yield from scanner.until((begin,), scanner.content)):
            try:
                yield from _read_calls(scanner, (end, begin))
                yield from close_call(scanner, end)
                drop_begun(scanner, (end,))
            except Malformed:
                scanner.fail()

    def call_format(tools: list[tuple[str, dict[str, Any]]], parallel: bool) -> Format:
        calls = tags([python_call(tool, schema) for tool, schema in tools], separator, parallel)
        return sequence(const(begin + around[0]), calls, const(around[1] + end))

    return ToolFamily(name, run, (begin, end), call_format)


def _read_calls(scanner: Scanner, ends: tuple[str, ...]) -> Steps[None]:
    """Calls up to one of the ends, in brackets or not. LFM2 writes them as JSON where a prompt asks for it."""
    character = yield from scanner.space()
    if character == "[":
        following, distance = yield from scanner.look_past(SPACE, 1)
        if following == "{":
            yield from read_call_list(scanner, ends)
            return
        scanner.skip(distance)
    elif character == "{":
        yield from read_call_object(scanner, ends)
        return
    while True:
        yield from read_python_call(scanner)
        character, distance = yield from scanner.look_past(_SEPARATORS)
        if character == "]":
            scanner.skip(distance + 1)
            return
        if not character or (yield from scanner.look_at(ends, distance)) is not None:
            return
        drop_begun(scanner, ends)
        if scanner.closed and scanner.at == len(scanner.text):
            return
        scanner.begin()
        scanner.skip(distance)


LFM2 = _family("lfm2", "<|tool_call_start|>", "<|tool_call_end|>", around=("[", "]"), separator=", ")
OLMO3 = _family("olmo3", "<function_calls>", "</function_calls>", around=("\n", "\n"), separator="\n")

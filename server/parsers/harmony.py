"""gpt-oss: every message says its channel, `<|channel|>analysis<|message|>...<|end|>`: reasoning, content or a call.

One grammar reads reasoning and calls, so both registries name it.
"""

from __future__ import annotations

import re
from typing import Any

from server.parsers.base import Malformed, ReasoningFamily, Scanner, Steps, ToolFamily
from server.parsers.formats import schema_of, tags
from server.parsers.json_text import read_json

_START, _CHANNEL, _MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
_CONSTRAIN, _END, _RETURN, _CALL = "<|constrain|>", "<|end|>", "<|return|>", "<|call|>"
_ENDS = (_END, _RETURN, _CALL)
_MARKERS = (_START, _CHANNEL, _MESSAGE, _CONSTRAIN, *_ENDS)
_MAX_HEADER = 512
_CHANNEL_NAME = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")


def _run(scanner: Scanner) -> Steps[None]:
    sink = scanner.content
    while marker := (yield from scanner.until((_START, _CHANNEL, _MESSAGE, *_ENDS), sink)):
        sink = scanner.content
        if marker not in (_START, _CHANNEL):
            scanner.settle()
            continue
        try:
            header, _ = yield from scanner.raw_until((_MESSAGE,), _MAX_HEADER)
        except Malformed:
            if scanner.closed:
                # Cut off in the middle of a header, which nobody wants to read.
                scanner.skip(len(scanner.text) - scanner.at)
                scanner.settle()
            else:
                scanner.fail()
            continue
        header = marker + header
        channel = _CHANNEL_NAME.search(header)
        recipient = _RECIPIENT.search(header)
        if recipient is not None and scanner.has_tools and not _is_builtin(recipient[1]):
            try:
                yield from _read_call(scanner, recipient[1].removeprefix("functions."))
            except Malformed:
                scanner.fail()
            continue
        scanner.settle()
        if channel is not None and channel[1] == "analysis":
            scanner.begin_reasoning()
            sink = scanner.reasoning
        else:
            scanner.end_reasoning()
    if sink == scanner.reasoning:
        scanner.flush_reasoning()


def _is_builtin(recipient: str) -> bool:
    """Tools of the model's own, which belong to its reasoning."""
    return recipient.split(".")[0] in ("python", "browser", "container")


def _read_call(scanner: Scanner, name: str) -> Steps[None]:
    if (yield from scanner.space()) != "{":
        raise Malformed
    scanner.start_call(name)
    yield from read_json(scanner, scanner.arguments)
    scanner.end_call()
    for marker in _ENDS:
        if (yield from scanner.accept(marker, spaced=True)):
            return


def _call_format(tools: list[tuple[str, dict[str, Any]]], parallel: bool) -> dict[str, Any]:
    # <|call|> is an EOS of these models, so there is one call in a turn.
    calls = [
        {
            "type": "tag",
            "begin": f"{_CHANNEL}commentary to=functions.{name} {_CONSTRAIN}json{_MESSAGE}",
            "content": schema_of(schema),
            "end": "",
        }
        for name, schema in tools
    ]
    return tags(calls, "", False)


def _run_reasoning(scanner: Scanner, start_inside: bool) -> Steps[None]:
    yield from _run(scanner)


FAMILY = ToolFamily("harmony", _run, _MARKERS, _call_format)
_FINAL = f"{_CHANNEL}final{_MESSAGE}"
REASONING = ReasoningFamily(
    "harmony",
    _run_reasoning,
    _MARKERS,
    open=f"{_CHANNEL}analysis{_MESSAGE}",
    close=_FINAL,
    closing=f"{_END}{_START}assistant{_FINAL}",
    whole=True,
    end=_END,
)

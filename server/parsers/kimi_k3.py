"""Kimi K3: `<|open|>name<|sep|>...<|close|>name<|sep|>` around all: reasoning, response, calls, arguments.

Arguments say their type; values are bare text, or JSON where they are no text.
"""

from __future__ import annotations

from typing import Any

from engine.text.schema_types import Types
from server.parsers.base import ToolFamily
from server.parsers.formats import Format, const, either, sequence
from server.parsers.marked_thoughts import thoughts
from server.parsers.tagged import Tags, family

_TOKENS = ("<|open|>", "<|sep|>", "<|close|>", "<|end_of_msg|>")


def _open(name: str) -> str:
    return f"<|open|>{name}<|sep|>"


def _close(name: str) -> str:
    return f"<|close|>{name}<|sep|>"


_WRAP = (_open("response"), _close("response"), _close("message"), "<|end_of_msg|>")


def _types(admitted: Types) -> list[str]:
    named = admitted - {"integer"} if "number" in admitted else admitted
    return sorted(f' type="{"number" if name == "integer" else name}"' for name in named)


_CALLS = family(
    "kimi_k3",
    Tags(
        call=("<|open|>call tool=", "<|sep|>"),
        call_end=_close("call"),
        key=("<|open|>argument key=", "<|sep|>"),
        value=("", _close("argument")),
        section=(_open("tools"), _close("tools")),
        quoted=True,
        attribute=_types,
        count="index",
        escaped=True,
        special=_TOKENS,
        line="",
        between="",
    ),
)


def _call_format(tools: list[tuple[str, dict[str, Any]]], parallel: bool) -> Format:
    """Behind an empty response, which the prompt may have opened."""
    empty = (const(_open("response") + _close("response")), const(_close("response")), const(""))
    return sequence(either(*empty), _CALLS.call_format(tools, parallel))


FAMILY = ToolFamily("kimi_k3", _CALLS.run, _TOKENS, _call_format, wrap=_WRAP)
REASONING = thoughts("kimi_k3", (_open("think"),), (_close("think"),), wrap=_WRAP, markers=_TOKENS)

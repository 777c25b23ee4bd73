"""The text of a chat's choice as a message: content, reasoning and tool calls, whole or as deltas.

A Reading belongs to one request and says how its outputs are to be read; each choice has a parser of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from engine.request import FinishReason
from engine.stream import Delta
from engine.text.tokenizer import Tokenizer
from server.custom_calls import CustomParser
from server.parsers.base import (
    ContentDelta,
    Event,
    OutputParser,
    ReasoningDelta,
    ReasoningFamily,
    ReasoningStyle,
    ToolCallStart,
    ToolFamily,
)
from server.protocol.thinking import ReasoningWatch

Json = dict[str, object]
# Ends of a text that are none of the model's own.
_CUTS = (FinishReason.LENGTH, FinishReason.ABORT)


@dataclass(frozen=True, slots=True)
class Reading:
    """tool_family: None where no calls are looked for. start_inside: the prompt has opened the reasoning already.

    tools: parameters by name of the functions that may be called. refused: names that were declared and may not be.
    custom: of tools whose calls have a bare string as input. origins: namespace and inner name of functions that the
    model knows by a flat name. max_calls: later calls are left out. style: what becomes of the reasoning.
    """

    tool_family: ToolFamily | None
    reasoning_family: ReasoningFamily | None
    start_inside: bool = False
    tools: Mapping[str, Any] = field(default_factory=dict)
    max_calls: int | None = None
    style: ReasoningStyle = "apart"
    refused: Collection[str] = ()
    custom: Collection[str] = ()
    origins: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def make_parser(self, *, buffer_calls: bool = False) -> OutputParser:
        make = partial(CustomParser, self.custom) if self.custom else OutputParser
        return make(
            self.tool_family,
            self.reasoning_family,
            start_inside=self.start_inside,
            tools=self.tools,
            refused=self.refused,
            buffer_calls=buffer_calls,
            max_calls=self.max_calls,
            style=self.style,
        )

    def make_watch(self, tokenizer: Tokenizer | None) -> ReasoningWatch | None:
        """Counts the reasoning tokens of one output; None where there are none to count."""
        if self.reasoning_family is None or tokenizer is None:
            return None
        return ReasoningWatch(tokenizer, self.reasoning_family, inside=self.start_inside)


def read_events(parser: OutputParser | None, delta: Delta) -> list[Event]:
    """What a delta's text means, with all that was held back where it is the last; without a parser it is content."""
    if parser is None:
        return [ContentDelta(delta.text)] if delta.text else []
    events = parser.push(delta.text) if delta.text else []
    return events if delta.finish_reason is None else [*events, *finish_events(parser, delta)]


def finish_events(parser: OutputParser, last: Delta) -> list[Event]:
    """What was held back up to the last delta. A call that a limit has cut off is one with what there is of it."""
    return parser.finish(cut=last.finish_reason in _CUTS)


def read_message(parser: OutputParser, delta: Delta, echo: str) -> Json:
    """`choices[].message` of a whole output. echo: text that its content begins with."""
    content, reasoning = [echo], ""
    calls: list[tuple[ToolCallStart, list[str]]] = []
    for event in read_events(parser, delta):
        if isinstance(event, ContentDelta):
            content.append(event.text)
        elif isinstance(event, ReasoningDelta):
            reasoning += event.text
        elif isinstance(event, ToolCallStart):
            calls.append((event, []))
        else:
            calls[-1][1].append(event.text)
    said = "".join(content)
    message: Json = {"role": "assistant", "content": said or (None if calls else "")}
    if reasoning:
        message |= {"reasoning": reasoning, "reasoning_content": reasoning}
    if calls:
        message["tool_calls"] = [
            {"id": start.id, **_call(start.custom, name=start.name, text="".join(pieces))} for start, pieces in calls
        ]
    return message


def _call(custom: bool, *, text: str, name: str | None = None) -> Json:
    """A call, or with no name a piece of one, as a chat has those of functions and of custom tools."""
    kind, key = ("custom", "input") if custom else ("function", "arguments")
    if name is None:
        return {kind: {key: text}}
    return {"type": kind, kind: {"name": name, key: text}}


def delta_of(event: Event) -> Json:
    """`choices[].delta` of one event."""
    if isinstance(event, ContentDelta):
        return {"content": event.text}
    if isinstance(event, ReasoningDelta):
        return {"reasoning": event.text, "reasoning_content": event.text}
    if isinstance(event, ToolCallStart):
        call: Json = {"index": event.index, "id": event.id, **_call(event.custom, name=event.name, text="")}
    else:
        call = {"index": event.index, **_call(event.custom, text=event.text)}
    return {"tool_calls": [call]}

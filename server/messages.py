"""The text of a chat's choice as a message: content, reasoning and tool calls, whole or as deltas.

A Reading belongs to one request and says how its outputs are to be read; each choice has a parser of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.stream import Delta
from server.parsers.base import (
    ContentDelta,
    Event,
    OutputParser,
    ReasoningDelta,
    ReasoningFamily,
    ToolCallStart,
    ToolFamily,
)

Json = dict[str, object]


@dataclass(frozen=True, slots=True)
class Reading:
    """tool_family: None where no calls are looked for. start_inside: the prompt has opened the reasoning already.

    tools: parameters by name of the functions that may be called. max_calls: later calls are left out.
    """

    tool_family: ToolFamily | None
    reasoning_family: ReasoningFamily | None
    start_inside: bool = False
    tools: Mapping[str, Any] = field(default_factory=dict)
    max_calls: int | None = None

    def make_parser(self, *, buffer_calls: bool = False) -> OutputParser:
        return OutputParser(
            self.tool_family,
            self.reasoning_family,
            start_inside=self.start_inside,
            tools=self.tools,
            buffer_calls=buffer_calls,
            max_calls=self.max_calls,
        )


def read_events(parser: OutputParser | None, delta: Delta) -> list[Event]:
    """What a delta's text means, with all that was held back where it is the last; without a parser it is content."""
    if parser is None:
        return [ContentDelta(delta.text)] if delta.text else []
    events = parser.push(delta.text) if delta.text else []
    return events if delta.finish_reason is None else [*events, *parser.finish()]


def read_message(parser: OutputParser, text: str, echo: str) -> Json:
    """`choices[].message` of a whole output. echo: text that its content begins with."""
    content, reasoning = [echo], ""
    calls: list[tuple[ToolCallStart, list[str]]] = []
    for event in (*parser.push(text), *parser.finish()):
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
            {
                "id": start.id,
                "type": "function",
                "function": {"name": start.name, "arguments": "".join(pieces)},
            }
            for start, pieces in calls
        ]
    return message


def delta_of(event: Event) -> Json:
    """`choices[].delta` of one event."""
    if isinstance(event, ContentDelta):
        return {"content": event.text}
    if isinstance(event, ReasoningDelta):
        return {"reasoning": event.text, "reasoning_content": event.text}
    if isinstance(event, ToolCallStart):
        function = {"name": event.name, "arguments": ""}
        call: Json = {"index": event.index, "id": event.id, "type": "function", "function": function}
    else:
        call = {"index": event.index, "function": {"arguments": event.text}}
    return {"tool_calls": [call]}

"""What comes out of a parser: pieces of content, of reasoning, and of calls."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ContentDelta:
    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """custom: its arguments are the input of a custom tool, no JSON."""

    index: int
    id: str
    name: str
    custom: bool = False


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """A piece of the JSON text of a call's arguments, or of a custom tool's input."""

    index: int
    text: str
    custom: bool = False


Event = ContentDelta | ReasoningDelta | ToolCallStart | ToolCallArguments


class Malformed(Exception):
    """What looked like a call is none."""


def kind_of(event: Event) -> tuple[type[Event], int]:
    """The event's class, and the index of its call: neighbours of one kind can be melted together."""
    return type(event), event.index if isinstance(event, ToolCallStart | ToolCallArguments) else 0

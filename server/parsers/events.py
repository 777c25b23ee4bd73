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
    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """A piece of the JSON text of a call's arguments."""

    index: int
    text: str


Event = ContentDelta | ReasoningDelta | ToolCallStart | ToolCallArguments


class Malformed(Exception):
    """What looked like a call is none."""


def kind_of(event: Event) -> tuple[type[Event], int]:
    """The event's class, and the index of its call: neighbours of one kind can be melted together."""
    return type(event), event.index if isinstance(event, ToolCallStart | ToolCallArguments) else 0

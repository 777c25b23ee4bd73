"""The one engine behind every output parser: text comes in pieces of any size, events go out.

A family's grammar is a generator that reads characters through a Scanner and pauses when they run out. One parser per
streamed choice.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from server.parsers.drafts import CallDrafts
from server.parsers.events import (
    ContentDelta,
    Event,
    Malformed,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallStart,
    kind_of,
)
from server.parsers.scanner import MAX_NAME, SPACE, Drafts, Scanner, Sink, Steps, StrayMarks

__all__ = [
    "MAX_JSON_DEPTH",
    "MAX_NAME",
    "SPACE",
    "ContentDelta",
    "Event",
    "Malformed",
    "OutputParser",
    "ReasoningDelta",
    "ReasoningFamily",
    "ReasoningState",
    "ReasoningStyle",
    "Scanner",
    "Sink",
    "Steps",
    "ToolCallArguments",
    "ToolCallStart",
    "ToolFamily",
    "make_call_id",
]

# Reasoning in fields of its own as it comes, each stretch of it at once, left out, or in the content with its marks.
ReasoningStyle = Literal["apart", "held", "hidden", "inline"]
# Where a text leaves the reasoning: it has none so far, stands inside of it, or behind it.
ReasoningState = Literal["none", "inside", "over"]

# Arguments are read by a client's parser; a model that nests deeper than this has lost its way.
MAX_JSON_DEPTH = 64


def make_call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


@dataclass(frozen=True, slots=True)
class ToolFamily:
    """How one family of models writes tool calls.

    run: the grammar; it reads from content to the end of the text. markers: texts that are special tokens in some
    models, to be kept by the detokenizer. call_format: the structural tag that forces calls, from (name, JSON schema)
    of each tool that may be called and whether there may be several. marked: nothing but a call begins as its calls do;
    otherwise what looks like one may be an ordinary answer, unless it names a declared tool. wrap: marks around content
    that are none of it.
    """

    name: str
    run: Callable[[Scanner], Steps[None]]
    markers: tuple[str, ...]
    call_format: Callable[[list[tuple[str, dict[str, Any]]], bool], dict[str, Any]]
    make_id: Callable[[], str] = make_call_id
    marked: bool = True
    wrap: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ReasoningFamily:
    """How one family of models marks its reasoning.

    run: the grammar; it reads from the start of the text to where content begins, from inside of the reasoning where
    the flag says so. open, close: the tags; the prompt may hold both, and content follows the second. closing: what
    ends a reasoning that has used up its budget. whole: it reads tool calls as well, and reasoning may come in several
    stretches, each from `open` to `end`. wrap: marks around the content behind it that are none of it. others: more
    pairs of tags; any closing one ends what any other has opened, and `closing` has that of the pair. to_end: `run`
    reads calls and content, too, for reasoning may come again; only the first is counted.
    """

    name: str
    run: Callable[[Scanner, bool], Steps[None]]
    markers: tuple[str, ...]
    open: str = ""
    close: str = ""
    closing: str = ""
    whole: bool = False
    end: str = ""
    wrap: tuple[str, ...] = ()
    others: tuple[tuple[str, str], ...] = ()
    to_end: bool = False

    @property
    def opens(self) -> tuple[str, ...]:
        """All marks that begin a reasoning."""
        return tuple(filter(None, (self.open, *(pair[0] for pair in self.others))))

    @property
    def closes(self) -> tuple[str, ...]:
        """All marks that content follows, in the order of `opens`."""
        return tuple(filter(None, (self.close, *(pair[1] for pair in self.others))))

    @property
    def ends(self) -> tuple[str, ...]:
        """All marks that end a stretch of reasoning."""
        return (self.end,) if self.end else self.closes

    @property
    def closings(self) -> tuple[str, ...]:
        """`closing` for each of `opens`."""
        return (self.closing, *(self.closing.replace(self.close, pair[1]) for pair in self.others))

    def has_marks(self, text: str) -> bool:
        """Whether a text holds any mark at all."""
        return any(mark in text for mark in (*self.opens, *self.closes, *self.ends))

    def opened_by(self, text: str) -> ReasoningFamily:
        """The family as the last opening mark of a text has it: with that pair as its first."""
        if not self.others:
            return self
        pairs = ((self.open, self.close), *self.others)
        first = max(pairs, key=lambda pair: text.rfind(pair[0]))
        others = tuple(pair for pair in pairs if pair != first)
        closing = self.closing.replace(self.close, first[1])
        return replace(self, open=first[0], close=first[1], closing=closing, others=others)

    def follow(self, text: str, start: int = 0) -> ReasoningState:
        """Where a text leaves the reasoning: a turn is gone through mark by mark. It begins at `start`, give or take
        a part of a mark: one that ends behind it counts."""
        state: ReasoningState = "none"
        if not self.open:
            return state
        known = sorted((*self.opens, *self.closes, *self.ends), key=len, reverse=True)
        marks = re.compile("|".join(map(re.escape, known)))
        before = len(known[0])
        for found in marks.finditer(text, max(0, start - before)):
            if found.end() <= start:
                continue
            mark = found[0]
            if mark in self.closes:
                state = "over"
            elif mark in self.opens:
                state = "inside"
            elif state == "inside":
                state = "none"
        return state


class OutputParser:
    """Events of one output. `push` the text as it comes, then `finish` once.

    tools: parameters by name of the tools that may be called, None where nothing is known of them. A call of a name
    that nobody declared is one all the same, for the client to answer; only one without a mark has to name a declared
    tool, in whatever case. refused: names that were declared and must not be called: content. buffer_calls: the events
    of a call come all at once, as it ends.
    max_calls: later calls are left out (`parallel_tool_calls: false`). style: what becomes of the reasoning.
    """

    def __init__(
        self,
        tool: ToolFamily | None,
        reasoning: ReasoningFamily | None,
        *,
        start_inside: bool = False,
        tools: Mapping[str, Any] | None = None,
        buffer_calls: bool = False,
        max_calls: int | None = None,
        style: ReasoningStyle = "apart",
        make_id: Callable[[], str] | None = None,
        refused: Collection[str] = (),
    ) -> None:
        self._max_calls = max_calls
        self._style = style
        # Reasoning that waits for its end.
        self._held = ""
        new_id = make_id or (tool.make_id if tool is not None else make_call_id)
        read = None if style == "inline" else reasoning
        wrap = (*(tool.wrap if tool is not None else ()), *(read.wrap if read is not None else ()))
        opens, closes = ((), ()) if read is None or read.whole else (read.opens, read.closes)
        stray = StrayMarks(opens, closes, wrap) if closes or wrap else None

        def make_drafts(scanner: Scanner) -> Drafts:
            if tool is None:
                return CallDrafts(scanner, None)
            # Marks around content are the reasoning's own text here, and CallDrafts counts its characters.
            bare = replace(tool, wrap=())
            reader = OutputParser(bare, None, tools=tools, make_id=new_id, refused=refused)
            return CallDrafts(scanner, reader)

        marked = tool is None or tool.marked
        self._scanner = Scanner(
            tool is not None, tools, buffer_calls, new_id, stray, make_drafts, refused=refused, marked=marked
        )
        self._steps: Steps[None] | None = _run(self._scanner, tool, read, start_inside)
        self.markers = (*(tool.markers if tool else ()), *(reasoning.markers if reasoning else ()), *wrap)

    @property
    def num_calls(self) -> int:
        """Calls so far, but for those left out."""
        most = self._scanner.num_calls
        return most if self._max_calls is None else min(most, self._max_calls)

    def push(self, text: str) -> list[Event]:
        """What the text adds, neighbours of one kind melted together."""
        self._scanner.feed(text)
        return self._resume()

    def finish(self, *, cut: bool = False) -> list[Event]:
        """What was held back. cut: a limit has ended the text, so that a call at its end stays open."""
        self._scanner.closed = True
        self._scanner.cut = cut
        events = self._resume()
        assert self._steps is None, "a grammar reads to the end"
        return events

    def _resume(self) -> list[Event]:
        if self._steps is not None:
            try:
                next(self._steps)
            except StopIteration:
                self._steps = None
        events = self._scanner.take_events()
        if self._style == "hidden":
            events = [event for event in events if not isinstance(event, ReasoningDelta)]
        elif self._style == "held":
            events = list(self._hold(events))
        if self._max_calls is not None:
            events = [event for event in events if kind_of(event)[1] < self._max_calls]
        return events

    def _hold(self, events: list[Event]) -> Iterator[Event]:
        """Each stretch of reasoning in one event, as what follows it comes."""
        for event in events:
            if isinstance(event, ReasoningDelta):
                self._held += event.text
                continue
            if self._held:
                yield ReasoningDelta(self._held)
                self._held = ""
            yield event
        if self._held and self._steps is None:
            yield ReasoningDelta(self._held)


def _run(
    scanner: Scanner, tool: ToolFamily | None, reasoning: ReasoningFamily | None, start_inside: bool
) -> Steps[None]:
    if reasoning is not None:
        yield from reasoning.run(scanner, start_inside)
    if tool is not None and (reasoning is None or not (reasoning.whole or reasoning.to_end)):
        yield from tool.run(scanner)
    yield from scanner.rest()

"""The one engine behind every output parser: text comes in pieces of any size, events go out.

A family's grammar is a generator that reads characters through a Scanner and pauses when they run out. It never sees
where a piece ended, so how tokens fall into pieces cannot change what comes out. One parser per streamed choice.
"""

from __future__ import annotations

import itertools
import re
import uuid
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeVar

T = TypeVar("T")
Steps = Generator[None, None, T]
Sink = Callable[[str], None]
# Reasoning in fields of its own as it comes, each stretch of it at once, left out, or in the content with its marks.
ReasoningStyle = Literal["apart", "held", "hidden", "inline"]

SPACE = " \t\r\n"
# Arguments are read by a client's parser; a model that nests deeper than this has lost its way.
MAX_JSON_DEPTH = 64
# Of names, headers and ids, which are held back until they are whole.
MAX_NAME = 256


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


def make_call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


@dataclass(frozen=True, slots=True)
class ToolFamily:
    """How one family of models writes tool calls.

    run: the grammar; it reads from content to the end of the text. markers: texts that are special tokens in some
    models, to be kept by the detokenizer. call_format: the structural tag that forces calls, from (name, JSON schema)
    of each tool that may be called and whether there may be several. marked: nothing but a call begins as its calls do;
    otherwise what looks like one may be an ordinary answer, unless it names a declared tool.
    """

    name: str
    run: Callable[[Scanner], Steps[None]]
    markers: tuple[str, ...]
    call_format: Callable[[list[tuple[str, dict[str, Any]]], bool], dict[str, Any]]
    make_id: Callable[[], str] = make_call_id
    marked: bool = True


@dataclass(frozen=True, slots=True)
class ReasoningFamily:
    """How one family of models marks its reasoning.

    run: the grammar; it reads from the start of the text to where content begins, from inside of the reasoning where
    the flag says so. open, close: the tags; the prompt may end with the first, and content follows the second.
    closing: what ends a reasoning that has used up its budget. whole: it reads tool calls as well, and reasoning may
    come in several stretches, each from `open` to `end`.
    """

    name: str
    run: Callable[[Scanner, bool], Steps[None]]
    markers: tuple[str, ...]
    open: str = ""
    close: str = ""
    closing: str = ""
    whole: bool = False
    end: str = ""

    def starts_inside(self, prompt: str) -> bool:
        """Whether the prompt's end has opened the reasoning already."""
        return bool(self.open) and prompt.rstrip().endswith(self.open)


class OutputParser:
    """Events of one output. `push` the text as it comes, then `finish` once.

    tools: parameters by name of the tools that may be called. A call of a name that nobody declared is one all
    the same, for the client to answer; only one without a mark has to name a declared tool, in whatever case. None: any
    name is a call. refused: names that were declared and must not be called: content.
    buffer_calls: a call comes whole or not at all, so one that breaks in its middle is content in full; otherwise its
    arguments stream, and what follows the break is content.
    max_calls: later calls are left out (`parallel_tool_calls: false`). style: what becomes of the reasoning.
    """

    def __init__(
        self,
        tool: ToolFamily | None,
        reasoning: ReasoningFamily | None,
        *,
        start_inside: bool = False,
        tools: Mapping[str, Any] | None = None,
        refused: Collection[str] = (),
        buffer_calls: bool = False,
        max_calls: int | None = None,
        style: ReasoningStyle = "apart",
        make_id: Callable[[], str] | None = None,
    ) -> None:
        self._max_calls = max_calls
        self._style = style
        # Reasoning that waits for its end.
        self._held = ""
        new_id = make_id or (tool.make_id if tool is not None else make_call_id)
        marked = tool is None or tool.marked
        self._scanner = Scanner(tool is not None, tools, buffer_calls, new_id, refused=refused, marked=marked)
        read = None if style == "inline" else reasoning
        self._steps: Steps[None] | None = _run(self._scanner, tool, read, start_inside)
        self.markers = (*(tool.markers if tool else ()), *(reasoning.markers if reasoning else ()))

    @property
    def num_calls(self) -> int:
        """Calls so far, but for those left out."""
        most = self._scanner.num_calls
        return most if self._max_calls is None else min(most, self._max_calls)

    def push(self, text: str) -> list[Event]:
        """What the text adds, neighbours of one kind melted together."""
        self._scanner.feed(text)
        return self._resume()

    def finish(self) -> list[Event]:
        """What was held back."""
        self._scanner.closed = True
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
            events = [event for event in events if _kind(event)[1] < self._max_calls]
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
    if tool is not None and (reasoning is None or not reasoning.whole):
        yield from tool.run(scanner)
    yield from scanner.rest()


class Scanner:
    """The text that has come and where the grammar stands in it, and the events that go out.

    An attempt at a call begins at a mark; when it fails, the text since the mark is content, as it was.
    """

    def __init__(
        self,
        has_tools: bool,
        tools: Mapping[str, Any] | None,
        buffer_calls: bool,
        make_id: Callable[[], str],
        *,
        refused: Collection[str] = (),
        marked: bool = True,
    ) -> None:
        self.has_tools = has_tools
        self.tools = tools
        self._refused = refused
        # Without a mark: the names that are calls, in lower case.
        self._names = None if marked or tools is None else frozenset(name.casefold() for name in tools)
        self.closed = False
        self.num_calls = 0
        self._buffer_calls = buffer_calls
        self._make_id = make_id
        self.text = ""
        self.at = 0
        # Start of what no event stands for yet; None outside of an attempt.
        self._mark: int | None = None
        self._events: list[Event] = []
        # The call that is being read, where calls are buffered.
        self._call: list[Event] | None = None
        # White space that is left out when a call or the end of reasoning follows it.
        self._space = ""
        self._skip_space = False
        self._behind_call = False
        # Some of the call that is being read has gone out.
        self._sent = False

    # Input.

    def feed(self, text: str) -> None:
        done = self.at if self._mark is None else self._mark
        if done:
            self.text = self.text[done:] + text
            self.at -= done
            if self._mark is not None:
                self._mark = 0
        else:
            self.text += text

    def take_events(self) -> list[Event]:
        """What has come out since the last time, neighbours of one kind melted together."""
        if len(self._events) < 2:
            events, self._events = self._events, []
            return events
        merged: list[Event] = []
        for (kind, index), group in itertools.groupby(self._events, _kind):
            if kind is ToolCallStart:
                merged += group
                continue
            text = "".join(event.text for event in group if not isinstance(event, ToolCallStart))
            if kind is ToolCallArguments:
                merged.append(ToolCallArguments(index, text))
            else:
                merged.append(ContentDelta(text) if kind is ContentDelta else ReasoningDelta(text))
        self._events = []
        return merged

    # Output.

    def content(self, text: str) -> None:
        """Content. Where calls may follow, the white space at its end waits until it is known what does."""
        if self._skip_space:
            text = text.lstrip(SPACE)
            if not text:
                return
            self._skip_space = False
        if self.has_tools:
            text = self._space + text
            body = text.rstrip(SPACE)
            self._space = text[len(body) :]
            text = body
        if text:
            self._behind_call = False
            self._events.append(ContentDelta(text))

    def reasoning(self, text: str) -> None:
        """Reasoning, without the white space around it."""
        if self._skip_space:
            text = text.lstrip(SPACE)
            if not text:
                return
            self._skip_space = False
        text = self._space + text
        body = text.rstrip(SPACE)
        self._space = text[len(body) :]
        if body:
            self._events.append(ReasoningDelta(body))

    def begin_reasoning(self) -> None:
        """Reasoning follows; white space at its start is left out."""
        self._space = ""
        self._skip_space = True
        self._mark = None

    def end_reasoning(self) -> None:
        """Content follows: the white space around the tag is neither's."""
        self._space = ""
        self._skip_space = True
        self._mark = None

    def flush_reasoning(self) -> None:
        """The text ended inside of the reasoning."""
        if self._space:
            self._events.append(ReasoningDelta(self._space))
            self._space = ""

    def flush_content(self) -> None:
        """The text has ended: white space that waited for a call, unless it stands behind one, is content."""
        if self._space and not self._behind_call:
            self._events.append(ContentDelta(self._space))
        self._space = ""

    def start_call(self, name: str) -> None:
        """The call is one: its name is known. Raises Malformed for a name that makes it none; see OutputParser."""
        known = self.tools is None or name in self.tools
        if not known and (name in self._refused or len(name) > MAX_NAME or not name.isprintable()):
            raise Malformed
        if not name or not (known or self._names is None or name.casefold() in self._names):
            raise Malformed
        start = ToolCallStart(self.num_calls, self._make_id(), name)
        if self._buffer_calls:
            self._call = [start]
        else:
            self._sent = True
            self._commit([start])

    def arguments(self, text: str) -> None:
        """The next piece of the arguments."""
        piece = ToolCallArguments(self.num_calls, text)
        if self._call is not None:
            self._call.append(piece)
        else:
            self._commit([piece])

    def end_call(self) -> None:
        """The call is whole."""
        if self._call is not None:
            self._commit(self._call)
            self._call = None
        self._mark = None
        self._sent = False
        self.num_calls += 1

    def _commit(self, events: list[Event]) -> None:
        self._events += events
        self._space = ""
        self._skip_space = False
        self._behind_call = True
        self._mark = self.at

    def begin(self) -> None:
        """An attempt at a call begins here."""
        self._mark = self.at

    def settle(self) -> None:
        """The attempt has come to something; what it read is no content."""
        self._mark = None

    def fail(self) -> None:
        """The attempt is over; what no event stands for is content, and reading goes on behind it."""
        if self._sent:
            # Its index is used up; what is left of it cannot be taken back.
            self.num_calls += 1
            self._sent = False
        self._call = None
        if self._mark is not None:
            text = self.text[self._mark : self.at]
            self._mark = None
            self.content(text)

    # Reading. Each step waits for more text where it needs some.

    def peek(self) -> Steps[str]:
        """The next character, "" at the end of the text."""
        while self.at >= len(self.text):
            if self.closed:
                return ""
            yield
        return self.text[self.at]

    def space(self) -> Steps[str]:
        """Skip white space; returns the character behind it."""
        while (character := (yield from self.peek())) and character in SPACE:
            self.at += 1
        return character

    def look_past(self, skipped: str) -> Steps[tuple[str, int]]:
        """The first character that is none of `skipped`, and how far away it is. Nothing is read."""
        distance = 0
        while True:
            place = self.at + distance
            if place < len(self.text):
                if self.text[place] not in skipped:
                    return self.text[place], distance
                distance += 1
            elif self.closed:
                return "", distance
            else:
                yield

    def skip(self, count: int) -> None:
        self.at += count

    def expect(self, literal: str) -> Steps[None]:
        if not (yield from self.accept(literal)):
            raise Malformed

    def accept(self, literal: str, *, spaced: bool = False) -> Steps[bool]:
        """Read a literal if it comes next (`spaced`: behind white space); otherwise nothing is read."""
        distance = 0
        if spaced:
            _, distance = yield from self.look_past(SPACE)
        while True:
            found = self.text[self.at + distance : self.at + distance + len(literal)]
            if found == literal:
                self.at += distance + len(literal)
                return True
            if not literal.startswith(found) or self.closed:
                return False
            yield

    def word(self, pattern: re.Pattern[str]) -> Steps[str]:
        """A name: the run of characters that each match the pattern. Malformed when there are none or too many."""
        found: list[str] = []
        while (character := (yield from self.peek())) and pattern.match(character):
            self.at += 1
            found.append(character)
            if len(found) > MAX_NAME:
                raise Malformed
        if not found:
            raise Malformed
        return "".join(found)

    def until(self, markers: tuple[str, ...], sink: Sink) -> Steps[str | None]:
        """Send text to the sink up to the first marker and read it; an attempt begins at it. None at the end.

        An end of the text that may begin a marker is held back.
        """
        compiled = _compile_markers(markers)
        while True:
            found = compiled.pattern.search(self.text, self.at)
            end = self._possible_end(compiled) if found is None else found.start()
            if end > self.at:
                piece, self.at = self.text[self.at : end], end
                sink(piece)
            if found is not None:
                self._mark, self.at = found.start(), found.end()
                return found[0]
            if self.closed:
                return None
            yield

    def raw_until(self, markers: tuple[str, ...], most: int) -> Steps[tuple[str, str]]:
        """The text up to a marker, and the marker; both are read. Malformed at the end or beyond `most` characters."""
        compiled = _compile_markers(markers)
        start = self.at
        assert self._mark is not None and self._mark <= start, "only an attempt can take its text back"
        ahead = start - self._mark
        while True:
            start = self._mark + ahead
            found = compiled.pattern.search(self.text, self.at)
            end = self._possible_end(compiled) if found is None else found.start()
            self.at = min(end, start + most + 1)
            if self.at - start > most or (found is None and self.closed):
                raise Malformed
            if found is not None:
                self.at = found.end()
                return self.text[start:end], found[0]
            yield

    def rest(self) -> Steps[None]:
        """Everything that is left is content."""
        while True:
            if self.at < len(self.text):
                text, self.at = self.text[self.at :], len(self.text)
                self.content(text)
            if self.closed:
                self.flush_content()
                return
            yield

    def _possible_end(self, markers: _Markers) -> int:
        """Where the text ends that can be no part of a marker."""
        end = len(self.text)
        start = max(self.at, end - markers.longest + 1)
        if not self.closed and not markers.firsts.isdisjoint(self.text[start:]):
            for place in range(start, end):
                if self.text[place:] in markers.prefixes:
                    return place
        return end


@dataclass(frozen=True, slots=True)
class _Markers:
    """Markers as a search needs them."""

    pattern: re.Pattern[str]
    prefixes: frozenset[str]
    firsts: frozenset[str]
    longest: int


@cache
def _compile_markers(markers: tuple[str, ...]) -> _Markers:
    prefixes = frozenset(marker[:size] for marker in markers for size in range(1, len(marker)))
    longest_first = sorted(markers, key=len, reverse=True)
    return _Markers(
        pattern=re.compile("|".join(map(re.escape, longest_first))),
        prefixes=prefixes,
        firsts=frozenset(marker[0] for marker in markers),
        longest=max(map(len, markers)),
    )


def _kind(event: Event) -> tuple[type[Event], int]:
    return type(event), event.index if isinstance(event, ToolCallStart | ToolCallArguments) else 0

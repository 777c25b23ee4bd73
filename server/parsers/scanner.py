"""The text that has come and where a grammar stands in it: reading steps that pause where it runs out, and events.

A grammar never sees where a piece ended, so how tokens fall into pieces cannot change what comes out.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Generator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Protocol, TypeVar

from server.parsers.events import (
    ContentDelta,
    Event,
    Malformed,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallStart,
    kind_of,
)

T = TypeVar("T")
Steps = Generator[None, None, T]
Sink = Callable[[str], None]

SPACE = " \t\r\n"
# Of names, headers and ids, which are held back until they are whole.
MAX_NAME = 256
# What models put before a function's name: the namespace that they were trained with.
_NAMESPACE = re.compile(r"(?:functions?|tools?)[.:/]")


class Drafts(Protocol):
    """Where the text of a reasoning goes while it is open; see drafts.py."""

    def push(self, text: str) -> None: ...

    def close(self) -> None: ...

    def finish(self) -> bool: ...


class Scanner:
    """An attempt at a call begins at a mark; when it fails before the call has begun, the text since the mark is
    content, as it was. A call begins where its name is known.

    cut: the text was ended by a limit, not by the model. stray: what takes marks out of the content.
    """

    def __init__(
        self,
        has_tools: bool,
        tools: Mapping[str, Any] | None,
        buffer_calls: bool,
        make_id: Callable[[], str],
        stray: StrayMarks | None = None,
        make_drafts: Callable[[Scanner], Drafts] | None = None,
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
        self.cut = False
        self.num_calls = 0
        self.text = ""
        self.at = 0
        self._buffer_calls = buffer_calls
        self._make_id = make_id
        self._stray = stray
        self._make_drafts = make_drafts
        # Start of what no event stands for yet; None outside of an attempt.
        self._mark: int | None = None
        self._events: list[Event] = []
        # The call that is being read, where calls are buffered.
        self._call: list[Event] | None = None
        # White space that is left out when a call or the end of reasoning follows it.
        self._space = ""
        self._skip_space = False
        self._behind_call = False
        self._begun = False

    # Declarations.

    def resolve(self, name: str) -> str:
        """The declared name that a written one means, or the written one.

        `functions.` may stand before it, or the name itself.
        """
        name = name.strip()
        declared = (*(self.tools or ()), *self._refused)
        first, _, second = name.partition(".")
        if first == second and first in declared and name not in declared:
            return first
        bare = _NAMESPACE.sub("", name, count=1) if _NAMESPACE.match(name) and name not in declared else name
        return bare if bare in declared else name

    def is_declared(self, name: str) -> bool:
        """Whether a tool that may be called is known by this name."""
        return self.tools is not None and self.resolve(name) in self.tools

    def parameters(self, name: str) -> Any:
        """The parameters of a tool as they were declared; None where it is not."""
        return self.tools.get(self.resolve(name)) if self.tools is not None else None

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
        for (kind, index), group in itertools.groupby(self._events, kind_of):
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
        if self.cut and self._behind_call and not text.strip(SPACE + ",;"):
            # What separates a call from another, which a limit has cut off.
            return
        if self._stray is not None:
            text = self._stray.take_out(text)
        self._add_content(text)

    def _add_content(self, text: str) -> None:
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

    def drafts(self) -> Drafts:
        """Where the text of an open reasoning goes, in place of `reasoning`."""
        assert self._make_drafts is not None
        return self._make_drafts(self)

    def begin_reasoning(self) -> None:
        """Reasoning follows; white space at its start is left out."""
        self._flush_stray()
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
        self._flush_stray()
        if self._space and not self._behind_call:
            self._events.append(ContentDelta(self._space))
        self._space = ""

    def _flush_stray(self) -> None:
        if self._stray is not None:
            self._add_content(self._stray.flush(cut=self.cut))

    def start_call(self, name: str, call_id: str | None = None) -> None:
        """The call begins: its name is known, and whatever comes of its arguments, it is one.

        call_id: the model's own, where it has written one. A name that nobody declared is the client's to judge. Raises
        Malformed for what is no name, or makes it none; see OutputParser.
        """
        name = self.resolve(name)
        known = self.tools is None or name in self.tools
        if not known and (name in self._refused or len(name) > MAX_NAME or not name.isprintable()):
            raise Malformed
        if not name or not (known or self._names is None or name.casefold() in self._names):
            raise Malformed
        self._flush_stray()
        self._begun = True
        start = ToolCallStart(self.num_calls, call_id or self._make_id(), name)
        if self._buffer_calls:
            self._call = [start]
            self._mark = self.at
        else:
            self._commit([start])

    def arguments(self, text: str) -> None:
        """The next piece of the arguments."""
        if not text:
            return
        piece = ToolCallArguments(self.num_calls, text)
        if self._call is not None:
            self._call.append(piece)
            self._mark = self.at
        else:
            self._commit([piece])

    def end_call(self) -> None:
        """The call is over."""
        if self._call is not None:
            self._commit(self._call)
            self._call = None
        self._mark = None
        self._begun = False
        self.num_calls += 1

    def adopt(self, events: list[Event], num_calls: int) -> None:
        """Events of a reader of a part of the text, the calls among them counted from `self.num_calls` on."""
        first = self.num_calls
        shifted = [
            replace(event, index=first + event.index) if isinstance(event, ToolCallStart | ToolCallArguments) else event
            for event in events
        ]
        self._commit(shifted)
        self._mark = None
        self.num_calls += num_calls

    def _commit(self, events: list[Event]) -> None:
        self._events += events
        self._space = ""
        self._skip_space = False
        self._behind_call = True
        self._mark = self.at

    @property
    def has_begun(self) -> bool:
        """Whether a call is being read whose name is known."""
        return self._begun

    def begin(self) -> None:
        """An attempt at a call begins here."""
        self._mark = self.at

    def settle(self) -> None:
        """The attempt has come to something; what it read is no content."""
        self._mark = None

    @property
    def ahead(self) -> int:
        """How far the reading stands behind the beginning of the attempt."""
        assert self._mark is not None
        return self.at - self._mark

    def rewind(self, ahead: int = 0) -> None:
        """Back to where the attempt began, or so far behind that, to read it in another way."""
        assert self._mark is not None
        self.at = self._mark + ahead

    def fail(self) -> None:
        """The attempt is over; what no event stands for is content, and reading goes on behind it."""
        mark = self._mark
        if self._begun:
            self.end_call()
        self._mark = None
        # Behind a call, the begin of another that a limit has cut off is no words of the model's.
        is_rest = self.cut and self._behind_call and self.at == len(self.text)
        if mark is not None and not is_rest:
            self.content(self.text[mark : self.at])

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

    def look_past(self, skipped: str, distance: int = 0) -> Steps[tuple[str, int]]:
        """From so far away on, the first character that is none of `skipped`, and how far away it is itself.

        "" at the end of the text. Nothing is read.
        """
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

    def look_at(self, literals: tuple[str, ...], distance: int = 0) -> Steps[str | None]:
        """The longest of the literals that stands so far away. Nothing is read."""
        if not literals:
            return None
        compiled = _compile_markers(literals)
        while True:
            found = compiled.pattern.match(self.text, self.at + distance)
            rest = self.text[self.at + distance : self.at + distance + compiled.longest]
            # A longer one may still come.
            if self.closed or not (rest in compiled.prefixes or not rest):
                return None if found is None else found[0]
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
        marker = yield from self.before(markers, sink)
        if marker is not None:
            self._mark = self.at
            self.at += len(marker)
        return marker

    def before(self, markers: tuple[str, ...], sink: Sink) -> Steps[str | None]:
        """Send text to the sink up to the first marker, which is not read. None at the end."""
        compiled = _compile_markers(markers)
        while True:
            found = compiled.pattern.search(self.text, self.at)
            if found is None:
                self._drop_begun(compiled)
            end = self._possible_end(compiled) if found is None else found.start()
            if end > self.at:
                piece, self.at = self.text[self.at : end], end
                sink(piece)
            if found is not None:
                return found[0]
            if self.closed:
                return None
            yield

    def _drop_begun(self, markers: _Markers) -> None:
        """Behind a call, the begin of a marker that a limit has cut off is no content."""
        if self.closed and self.cut and self._behind_call and not self._begun:
            start = max(self.at, len(self.text) - markers.longest + 1)
            self.text = self.text[: markers.possible_end(self.text, start)]

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
        return end if self.closed else markers.possible_end(self.text, start)


class StrayMarks:
    """Takes marks out of content that nothing of it has opened: a model may close its reasoning twice.

    Marks that stand in quotes or backticks are spoken of, and those of a pair are the text's own. wrap: marks that
    models write around their answer, which go whatever else there is.
    """

    def __init__(self, opens: tuple[str, ...], closes: tuple[str, ...], wrap: tuple[str, ...] = ()) -> None:
        self._opens = frozenset(opens)
        self._wrap = frozenset(wrap)
        self._markers = _compile_markers((*opens, *closes, *wrap))
        self._held = ""
        self._before = ""
        self._num_open = 0

    def take_out(self, text: str) -> str:
        """What of the text can be shown by now."""
        text = self._held + text
        at = 0
        pieces: list[str] = []
        for found in self._markers.pattern.finditer(text):
            pieces.append(text[at : found.start()])
            at = found.end()
            before = text[found.start() - 1] if found.start() else self._before
            if found[0] in self._wrap:
                continue
            if found[0] in self._opens:
                self._num_open += 1
            elif self._num_open:
                self._num_open -= 1
            elif not before or before not in "`'\"":
                continue
            pieces.append(found[0])
        start = max(at, len(text) - self._markers.longest + 1)
        end = self._markers.possible_end(text, start)
        pieces.append(text[at:end])
        self._held = text[end:]
        self._before = text[end - 1] if end else self._before
        return "".join(pieces)

    def flush(self, *, cut: bool) -> str:
        """What was held back and is no mark. cut: a limit has ended the text, maybe in the middle of one."""
        held, self._held = self._held, ""
        # A lone "<", or the word that a mark begins with, is text as a rule.
        begun = cut and "<" in held[:-1] and any(mark.startswith(held) for mark in self._wrap)
        return "" if begun else held


@dataclass(frozen=True, slots=True)
class _Markers:
    """Markers as a search needs them."""

    pattern: re.Pattern[str]
    prefixes: frozenset[str]
    firsts: frozenset[str]
    longest: int

    def possible_end(self, text: str, start: int) -> int:
        """Where the text ends that can be no part of a marker; one can begin at `start` at the earliest."""
        end = len(text)
        if not self.firsts.isdisjoint(text[start:]):
            for place in range(start, end):
                if text[place:] in self.prefixes:
                    return place
        return end


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

"""Calls inside of a reasoning: drafts where it closes later, the model's calls where it never does.

The text is read for calls while it streams; from where one begins on it waits until it is known which of both it is.
"""

from __future__ import annotations

from typing import Protocol

from server.parsers.events import ContentDelta, Event, ToolCallStart
from server.parsers.scanner import Scanner

# Most characters that wait in all, and of text behind a call. What passes them is a draft.
_MAX_WAITING = 256 * 1024
_MAX_BEHIND = 8 * 1024


class Reader(Protocol):
    """A parser of calls alone."""

    @property
    def num_calls(self) -> int: ...

    def push(self, text: str) -> list[Event]: ...

    def finish(self, *, cut: bool = False) -> list[Event]: ...


class CallDrafts:
    """Of one stretch of the scanner's reasoning. reader: fresh; None where there are no calls to look for."""

    def __init__(self, scanner: Scanner, reader: Reader | None) -> None:
        self._scanner = scanner
        self._reader = reader
        # Text that is not known to be reasoning yet, and what the reader made of it from its first call on.
        self._waiting = ""
        self._events: list[Event] = []
        self._names: list[str] = []
        # Characters behind the last call.
        self._num_behind = 0

    def push(self, text: str) -> None:
        """The next text of the reasoning."""
        if self._reader is None:
            self._scanner.reasoning(text)
            return
        self._waiting += text
        self._take(self._reader.push(text))
        if self._names and len(self._waiting) > _MAX_WAITING:
            self.close()

    def close(self) -> None:
        """All of it was reasoning."""
        self._scanner.reasoning(self._waiting)
        self._waiting = ""
        self._reader = None

    def finish(self) -> bool:
        """The text has ended, and the reasoning with it. Returns whether it ended in calls, which have gone out."""
        if self._reader is not None:
            tools, whole = self._scanner.tools, self._names[: self._reader.num_calls]
            self._take(self._reader.finish(cut=self._scanner.cut))
            # A limit may have cut off the thought that followed a draft.
            is_draft = self._reader is None or (self._scanner.cut and self._num_behind > 0)
            if not is_draft and any(tools is None or name in tools for name in whole):
                self._scanner.adopt(self._events, len(self._names))
                return True
        self.close()
        return False

    def _take(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, ToolCallStart):
                self._names.append(event.name)
                self._num_behind = 0
            elif isinstance(event, ContentDelta) and self._names:
                self._num_behind += len(event.text)
            elif isinstance(event, ContentDelta):
                # Up to the first call the reader's content is the text itself.
                self._scanner.reasoning(event.text)
                self._waiting = self._waiting[len(event.text) :]
                continue
            self._events.append(event)
            if self._num_behind > _MAX_BEHIND:
                self.close()
                return

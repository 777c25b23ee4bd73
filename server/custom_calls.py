"""Calls of custom tools: models write them as calls of functions with one string, clients get the bare string.

The pieces of the arguments' JSON become pieces of the input as they come. One reader per output.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

from server.parsers.base import Event, OutputParser, ToolCallArguments, ToolCallStart

# What every custom tool's function calls its one parameter.
INPUT = "input"
_BEGIN = re.compile(r'\s*\{\s*"input"\s*:\s*"')
# Whole characters of a JSON string. Surrogates come in pairs or stay what they are.
_WHOLE = re.compile(
    r'(?:[^"\\]|\\[^u]|\\u(?![dD][89a-fA-F])[0-9a-fA-F]{4}'
    r"|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})*"
)


class CustomParser(OutputParser):
    """An OutputParser whose calls of custom tools say so and carry their input. names: of those tools."""

    def __init__(self, names: Collection[str], *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._names = names
        # The call of a custom tool that is being read, and its index.
        self._input: _Input | None = None
        self._index = -1

    def push(self, text: str) -> list[Event]:
        """As OutputParser does."""
        return list(self._read(super().push(text)))

    def finish(self, *, cut: bool = False) -> list[Event]:
        """As OutputParser does."""
        return [*self._read(super().finish(cut=cut)), *self._end()]

    def _read(self, events: list[Event]) -> Iterator[Event]:
        for event in events:
            if self._input is not None and isinstance(event, ToolCallArguments) and event.index == self._index:
                yield from self._piece(self._input.push(event.text))
                continue
            yield from self._end()
            if isinstance(event, ToolCallStart) and event.name in self._names:
                self._input, self._index = _Input(), event.index
                event = replace(event, custom=True)
            yield event

    def _end(self) -> Iterator[Event]:
        if self._input is not None:
            yield from self._piece(self._input.finish())
            self._input = None

    def _piece(self, text: str) -> Iterator[Event]:
        if text:
            yield ToolCallArguments(self._index, text, custom=True)


class _Input:
    """The string in `{"input": "..."}`, from the pieces of that text."""

    def __init__(self) -> None:
        # What has not been given on yet.
        self._text = ""
        self._inside = False
        self._done = False

    def push(self, piece: str) -> str:
        """What the piece adds to the string."""
        if self._done:
            return ""
        self._text += piece
        if not self._inside:
            if (begin := _BEGIN.match(self._text)) is None:
                return ""
            self._inside, self._text = True, self._text[begin.end() :]
        whole = _WHOLE.match(self._text)
        assert whole is not None, "it matches nothing, too"
        self._text = self._text[whole.end() :]
        self._done = self._text.startswith('"')
        try:
            return str(json.loads(f'"{whole[0]}"', strict=False))
        except ValueError:
            # An escape that JSON has not.
            return whole[0]

    def finish(self) -> str:
        """What is left of it. Arguments of any other shape are the input as they are written."""
        if self._inside:
            # An escape that was cut off, or one half of a pair: there is no such character.
            return "" if self._done or len(self._text) < 12 else self._text
        try:
            value = json.loads(self._text, strict=False)
        except (ValueError, RecursionError):
            return self._text
        if isinstance(value, dict):
            said = value.get(INPUT, next(iter(value.values())) if len(value) == 1 else None)
            if isinstance(said, str):
                return said.encode("utf-8", "replace").decode()
            if not value:
                return ""
        return self._text

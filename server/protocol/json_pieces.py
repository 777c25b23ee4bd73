"""JSON of megabytes, parsed in pieces of about a millisecond: the parser keeps the interpreter's lock, so one call for
all of it would hold the event loop wherever it runs.

The text's structure is found by whole-array operations, which give up the lock; then members are parsed some at a
time. For a thread that is not the loop's.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

# Bytes of a piece: 0.3 ms of numbers or small objects.
PIECE = 16 * 1024
# Broken JSON of more is not parsed as a whole to say where: building what comes before that takes 20 ms a megabyte.
WHOLE = 1024 * 1024
# The parser's own limit; what is deeper is left to it to refuse.
MAX_DEPTH = 1024
# Brackets that are open where the rest is read at once: each takes two calls within calls, which have a limit, too.
MOST_NESTED = 256

_QUOTE, _BACKSLASH, _COMMA, _COLON = b'"\\,:'
# Where a string may be cut: before a character of several bytes, behind seven plain ones (an escape is at most six),
# before an escape that is no second half of a pair.
_CUT = re.compile(rb"[\xc0-\xf7]|[ !#-\[\]-~]{7}|(?<=[^\\])\\(?!u[dD][c-fC-F])")
_SPACE = b" \t\r\n"
_NO_SPACE = re.compile(rb"[^ \t\r\n]")

Positions = npt.NDArray[np.int64]


def loads(data: bytes, give_way: Callable[[], None] = lambda: time.sleep(2e-5)) -> Any:
    """What `orjson.loads` gives, and its errors; of much JSON a ValueError that says about where. give_way: called
    between two pieces."""
    if len(data) <= PIECE:
        return orjson.loads(data)
    reader = _Reader(data, give_way)
    try:
        reader.find_structure()
        return reader.value(0, len(data), 0)
    except (_Unclear, orjson.JSONDecodeError) as error:
        if len(data) > WHOLE and reader.has_structure:
            what = str(error) if isinstance(error, _Unclear) else error.msg
            raise ValueError(f"{what}, near byte {reader.place}") from None
    # The whole says what is wrong, and where.
    return orjson.loads(data)


class _Unclear(Exception):
    """The structure is not that of JSON, or too deep."""

    def __init__(self, what: str = "brackets, quotes and commas do not fit together") -> None:
        super().__init__(what)


class _Reader:
    """place: of what was read last. has_structure: there are brackets; a mere string is cheap as a whole."""

    def __init__(self, data: bytes, give_way: Callable[[], None]) -> None:
        self._data = data
        self._give_way = give_way
        self.place = 0
        self.has_structure = False

    def find_structure(self) -> None:
        array = np.frombuffer(self._data, np.uint8)
        quotes = array == _QUOTE
        self._drop_escaped(array, quotes)
        self._quotes: Positions = np.flatnonzero(quotes)
        # As bytes: numpy keeps the lock while it makes numbers of booleans.
        outside = (np.cumsum(quotes.view(np.uint8), dtype=np.uint8) & 1) == 0
        # 0x20 apart: { and [, } and ].
        folded = array | 0x20
        opens = (folded == ord("{")) & outside
        closes = (folded == ord("}")) & outside
        places = np.flatnonzero(opens | closes)
        levels = np.cumsum(np.where(opens[places], 1, -1))
        self.has_structure = bool(len(places))
        if not len(places):
            raise _Unclear
        if levels.max() > MAX_DEPTH:
            self.place = int(places[np.argmax(levels > MAX_DEPTH)])
            raise _Unclear(f"more than {MAX_DEPTH} brackets are open")
        if levels.min() < 0 or levels[-1] != 0:
            self.place = int(places[np.argmax(levels < 0)]) if levels.min() < 0 else len(array)
            raise _Unclear
        commas = np.flatnonzero((array == _COMMA) & outside)
        # Of each comma how many brackets are open.
        depths = np.concatenate([[0], levels])[np.searchsorted(places, commas)]
        order = np.argsort(depths, kind="stable")
        self._commas, self._depths = commas[order], depths[order]

    @staticmethod
    def _drop_escaped(array: npt.NDArray[np.uint8], quotes: npt.NDArray[np.bool_]) -> None:
        """Take quotes behind an odd run of backslashes away, in place."""
        slashes = np.flatnonzero(array == _BACKSLASH)
        if not len(slashes):
            return
        begins = np.flatnonzero(np.diff(slashes, prepend=-2) > 1)
        lengths = np.diff(begins, append=len(slashes))
        behind = slashes[begins] + lengths
        behind = behind[(lengths & 1 == 1) & (behind < len(quotes))]
        quotes[behind] = False

    def value(self, start: int, end: int, depth: int) -> Any:
        """The value in data[start:end]; depth: brackets that are open around it."""
        data, self.place = self._data, start
        if end - start <= PIECE or depth >= MOST_NESTED:
            return self._piece(data[start:end])
        while start < end and data[start] in _SPACE:
            start += 1
        while end > start and data[end - 1] in _SPACE:
            end -= 1
        first = data[start : start + 1]
        if first in (b"[", b"{"):
            if data[end - 1 : end] != (b"]" if first == b"[" else b"}"):
                raise _Unclear
            return self._container(start + 1, end - 1, depth + 1, is_list=first == b"[")
        if first == b'"':
            return self._string(start, end)
        return self._piece(data[start:end])

    def _container(self, start: int, end: int, depth: int, *, is_list: bool) -> Any:
        """Members between two brackets, many at a time; those that are large by themselves."""
        items: list[Any] = []
        fields: dict[str, Any] = {}
        first, last = np.searchsorted(self._depths, [depth, depth + 1])
        commas = self._commas[first:last]
        low, high = np.searchsorted(commas, [start, end])
        if low == high and _NO_SPACE.search(self._data, start, end) is None:
            return items if is_list else fields
        edges = [start - 1, *commas[low:high].tolist(), end]
        place = 0
        while place < len(edges) - 1:
            begin = edges[place] + 1
            # As many as fit, but one at least.
            until = place + 1
            while until < len(edges) - 1 and edges[until + 1] - begin <= PIECE:
                until += 1
            stop = edges[until]
            if stop - begin > PIECE:
                if is_list:
                    items.append(self.value(begin, stop, depth))
                else:
                    colon, name = self._name(begin, stop)
                    fields[name] = self.value(colon + 1, stop, depth)
            else:
                text, self.place = self._data[begin:stop], begin
                # Nothing between two commas is an error, and would be none in brackets of its own.
                part = self._piece(b"[%b]" % text if is_list else b"{%b}" % text)
                if not part:
                    raise _Unclear
                if is_list:
                    items += part
                else:
                    fields |= part
            place = until
        return items if is_list else fields

    def _name(self, start: int, end: int) -> tuple[int, str]:
        """The place of the colon behind a member's name, and the name."""
        at = int(np.searchsorted(self._quotes, start))
        if at + 1 >= len(self._quotes) or self._quotes[at + 1] >= end:
            raise _Unclear
        behind = int(self._quotes[at + 1]) + 1
        colon = behind
        while colon < end and self._data[colon] in _SPACE:
            colon += 1
        if colon >= end or self._data[colon] != _COLON:
            raise _Unclear
        name = self._piece(self._data[start:behind])
        if not isinstance(name, str):
            raise _Unclear
        return colon, name

    def _string(self, start: int, end: int) -> str:
        data, parts, begin = self._data, [], start + 1
        # One string and nothing behind it.
        at = int(np.searchsorted(self._quotes, start))
        if at + 1 >= len(self._quotes) or self._quotes[at] != start or self._quotes[at + 1] != end - 1:
            raise _Unclear
        while begin < end - 1:
            stop = end - 1
            # Strings are cheap: many bytes make a piece.
            if stop - begin > 8 * PIECE and (cut := _CUT.search(data, begin + 8 * PIECE, stop)):
                stop = cut.end() - 1
            parts.append(self._piece(b'"%b"' % data[begin:stop]))
            begin = stop
        return "".join(parts)

    def _piece(self, data: bytes) -> Any:
        value = orjson.loads(data)
        self._give_way()
        return value

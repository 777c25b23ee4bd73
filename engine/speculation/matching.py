"""Where in texts the same tokens stood before: an index of one text, and a bounded store of what others went on with.

Used by the proposers of the host. An entry costs about a microsecond to add; a search looks at a bounded number of
places, and compares there, so that entries may be stale.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from engine.speculation.base import Text

# Places that a search looks at, the latest first.
_MOST_PLACES = 16
# Tokens of a text that are indexed when it comes.
MOST_INDEXED = 65_536
# Of an entry, and the token it is of, in Python's objects.
_ENTRY_BYTES = 250
STORE_BYTES = 64 << 20
# Of a prompt, that are stored before its answer: what the answer's first tokens are found by.
_CONTEXT = 32
# Names are the clients' to choose.
_MOST_NAMESPACES = 1024


@dataclass(frozen=True, slots=True)
class Match:
    """The last `length` tokens of a text stand in `tokens` before index `end`."""

    length: int
    tokens: list[int]
    end: int


class TextIndex:
    """Places by the hash of the `order` tokens before them. Texts are not copied, and may be cut or grow."""

    def __init__(self, order: int) -> None:
        self.order = order
        self.size = 0
        # (tokens, end, the place before), or None.
        self._heads: dict[int, tuple[list[int], int, Any]] = {}

    def add(self, tokens: list[int], first: int, last: int) -> None:
        """The places first <= end < last; each should be followed by a token."""
        order, heads = self.order, self._heads
        for end in range(max(first, order), last):
            key = hash(tuple(tokens[end - order : end]))
            heads[key] = tokens, end, heads.get(key)
        self.size += max(0, last - max(first, order))

    def matches(self, tokens: list[int], limit: int) -> Iterator[Match]:
        """Where the last tokens of `tokens`, at least `order` of them and at most `limit` looked at, stand with a token
        behind them; the latest place first."""
        order = self.order
        if len(tokens) < order:
            return
        place = self._heads.get(hash(tuple(tokens[-order:])))
        for _ in range(_MOST_PLACES):
            if place is None:
                return
            where, end, place = place
            # Places of tokens that were cut away are stale, and what stands there now is another text.
            if end < len(where) and (length := common_suffix(where, end, tokens, limit)) >= order:
                yield Match(length, where, end)


def common_suffix(tokens: list[int], end: int, other: list[int], limit: int) -> int:
    """How many tokens before tokens[end] are those at the end of `other`; at most `limit`."""
    limit = min(limit, end, len(other))
    if tokens[end - limit : end] == other[len(other) - limit :]:
        return limit
    length, place = 0, end - 1
    at = len(other) - 1
    while length < limit and tokens[place] == other[at]:
        length, place, at = length + 1, place - 1, at - 1
    return length


def continuation(match: Match, own: list[int], most: int) -> list[int]:
    """What followed there. A text that repeats itself up to its very end is taken to go on so."""
    found = match.tokens[match.end : match.end + most]
    if match.tokens is own and found:
        period = len(found)
        while len(found) < most:
            found.append(found[len(found) - period])
    return found


class _Namespace:
    """Two generations of answers: when the younger is full, it becomes the elder, whose memory is given back. What is
    said again is in the younger one again."""

    def __init__(self, order: int) -> None:
        self.young, self.old = TextIndex(order), TextIndex(order)
        self.answers = 0

    @property
    def size(self) -> int:
        return self.young.size + self.old.size

    def turn(self) -> None:
        self.old, self.young = self.young, TextIndex(self.young.order)
        self.answers = 0


class Store:
    """What the sequences of each namespace went on with, the namespaces in order of use.

    max_bytes: of all, about. max_answers: of a namespace, 0 for none, None for as many as there is room for.
    """

    def __init__(self, order: int, *, max_bytes: int = STORE_BYTES, max_answers: int | None = None) -> None:
        self._order = order
        self._most = max(1, max_bytes // _ENTRY_BYTES)
        self._most_answers = max_answers
        self._namespaces: OrderedDict[str, _Namespace] = OrderedDict()
        self._size = 0

    @property
    def num_bytes(self) -> int:
        """About."""
        return self._size * _ENTRY_BYTES

    def _space(self, name: str) -> _Namespace:
        """Of that name, now the last to be forgotten."""
        space = self._namespaces.get(name)
        if space is None:
            space = self._namespaces[name] = _Namespace(self._order)
            if len(self._namespaces) > _MOST_NAMESPACES:
                self._size -= self._namespaces.popitem(last=False)[1].size
        self._namespaces.move_to_end(name)
        return space

    def begin(self, name: str) -> None:
        """An answer begins."""
        if self._most_answers == 0:
            return
        space = self._space(name)
        space.answers += 1
        if self._most_answers is not None and 2 * space.answers > self._most_answers:
            self._size -= space.old.size
            space.turn()

    def add(self, name: str, tokens: list[int], first: int, last: int) -> None:
        """See TextIndex.add."""
        if self._most_answers == 0:
            return
        space = self._space(name)
        before = space.size
        space.young.add(tokens, first, last)
        self._size += space.size - before
        while self._size > self._most and len(self._namespaces) > 1:
            self._size -= self._namespaces.popitem(last=False)[1].size
        if 2 * space.young.size > self._most:
            self._size -= space.old.size
            space.turn()

    def matches(self, name: str, tokens: list[int], own: list[int], limit: int) -> Iterator[Match]:
        """Of other sequences than the one whose answer is `own`."""
        space = self._namespaces.get(name)
        if space is None:
            return
        for index in (space.young, space.old):
            for match in index.matches(tokens, limit):
                if match.tokens is not own:
                    yield match


class Indexed:
    """A text with its index, and its answer in the store."""

    def __init__(self, text: Text, order: int, store: Store) -> None:
        self.text = text
        self._index = TextIndex(order)
        self._done = max(0, len(text.tokens) - MOST_INDEXED)
        self._store = store
        self._first = max(0, len(text.tokens) - _CONTEXT)  # in the text, of `answer`
        self._answer = text.tokens[self._first :]
        self._stored = len(self._answer)
        store.begin(text.namespace)

    def advance(self, kept: int) -> None:
        """The text has changed behind its first `kept` tokens."""
        self._done = min(self._done, kept)
        if kept < self._first:  # not an answer any more
            self._first, self._answer = kept, []
        del self._answer[kept - self._first :]
        self._answer += self.text.tokens[self._first + len(self._answer) :]
        self._stored = min(self._stored, max(0, kept - self._first))

    def matches(self, limit: int) -> Iterator[Match]:
        """Its own places, the latest first, then those of others."""
        tokens = self.text.tokens
        self._index.add(tokens, self._done, len(tokens))
        self._done = max(self._done, len(tokens))
        self._store.add(self.text.namespace, self._answer, self._stored, len(self._answer))
        self._stored = len(self._answer)
        yield from self._index.matches(tokens, limit)
        yield from self._store.matches(self.text.namespace, tokens, self._answer, limit)

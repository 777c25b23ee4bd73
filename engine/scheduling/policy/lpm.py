"""Longest prefix match first: what finds most of its prompt in the cache goes first, while it is still there.

Asks the radix tree at most WINDOW times a step (1.6 us for a prompt of 500 tokens, 2 us for 4,000), and only in steps
that could admit. In a longer queue first come, first served, as in SGLang.
"""

from __future__ import annotations

from engine.cache.kv_cache import KVCache
from engine.scheduling.policy.fcfs import FCFS
from engine.scheduling.sequence import Sequence

WINDOW = 128
# Admissions that may pass over the oldest that waits: a prompt of its own must not starve behind popular ones.
MAX_PASSED = 64


class LPM(FCFS):
    """A queue that is left from the middle. Ties go to the oldest, and retracted sequences before all."""

    def __init__(self, cache: KVCache) -> None:
        super().__init__(cache)
        self._cache = cache
        self._ranked: list[Sequence] = []  # best last
        self._ranked_in: int | None = None
        self._choice: Sequence | None = None
        self._oldest: Sequence | None = None
        self._num_passed = 0

    def peek(self, turn: int) -> Sequence | None:
        oldest = super().peek(turn)
        self._choice = oldest
        if oldest is None or oldest.is_retracted:
            return oldest
        if oldest is not self._oldest:
            self._oldest, self._num_passed = oldest, 0
        if not 1 < len(self._queue) <= WINDOW or self._num_passed >= MAX_PASSED:
            return oldest
        if turn != self._ranked_in:
            self._ranked_in = turn
            waiting = [sequence for sequence in reversed(self._queue) if not sequence.is_finished]
            self._ranked = sorted(waiting, key=self._match_length)
        self._choice = self._ranked[-1]
        return self._choice

    def pop(self) -> Sequence:
        self._num_passed += self._choice is not self._queue[0]
        return self._remove()

    def set_aside(self) -> None:
        self._remove()
        self._oldest = None

    def put_back(self, sequence: Sequence) -> None:
        super().put_back(sequence)
        self._ranked_in = self._oldest = None

    def _remove(self) -> Sequence:
        choice = self._choice
        assert choice is not None
        if self._ranked and choice is self._ranked[-1]:
            self._ranked.pop()
        else:
            self._ranked_in = None
        if choice is self._queue[0]:
            return super().pop()
        self._queue.remove(choice)
        return choice

    def _match_length(self, sequence: Sequence) -> int:
        return self._cache.match_length(sequence.matchable_ids, sequence.request.cache_root)

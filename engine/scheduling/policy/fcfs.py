"""First come, first served: the default. O(1) a decision."""

from __future__ import annotations

from collections import deque

from engine.cache.kv_cache import KVCache
from engine.scheduling.policy.base import AdmissionPolicy
from engine.scheduling.sequence import Sequence


class FCFS(AdmissionPolicy):
    """A queue; retracted sequences come back to its front, the oldest of them first."""

    def __init__(self, cache: KVCache) -> None:
        self._queue: deque[Sequence] = deque()
        self._compact_at = 1024

    def push(self, sequence: Sequence) -> None:
        if len(self._queue) >= self._compact_at:
            # Aborted ones are dropped at the head only; behind a head that waits they would pile up.
            self._queue = deque(waiting for waiting in self._queue if not waiting.is_finished)
            self._compact_at = max(1024, 2 * len(self._queue))
        self._queue.append(sequence)

    def push_front(self, sequence: Sequence) -> None:
        # Retraction goes from the newest to the oldest, but slots come back in any order.
        queue = self._queue
        index = 0
        while index < len(queue) and queue[index].is_retracted and queue[index].order < sequence.order:
            index += 1
        queue.insert(index, sequence)

    def peek(self, turn: int) -> Sequence | None:
        queue = self._queue
        while queue and queue[0].is_finished:
            queue.popleft()
        return queue[0] if queue else None

    def pop(self) -> Sequence:
        return self._queue.popleft()

    def set_aside(self) -> None:
        self._queue.popleft()

    def put_back(self, sequence: Sequence) -> None:
        if sequence.is_retracted:
            self.push_front(sequence)
            return
        queue, index = self._queue, 0
        while index < len(queue) and (queue[index].is_retracted or queue[index].order < sequence.order):
            index += 1
        queue.insert(index, sequence)

"""By the request's `priority`, the lowest number first, as in vLLM; equals in order of arrival. O(log n) a decision.

A request in the queue takes no place from one that runs; but when pages run out, the least important is retracted.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from engine.cache.kv_cache import KVCache
from engine.scheduling.policy.base import AdmissionPolicy
from engine.scheduling.sequence import Sequence


class Priority(AdmissionPolicy):
    """A heap. A retracted sequence has its old place in it, for it is the oldest of its priority."""

    def __init__(self, cache: KVCache) -> None:
        self._heap: list[tuple[int, int, Sequence]] = []
        self._compact_at = 1024

    def push(self, sequence: Sequence) -> None:
        if len(self._heap) >= self._compact_at:
            # Aborted ones are dropped at the top only.
            self._heap = [entry for entry in self._heap if not entry[2].is_finished]
            heapify(self._heap)
            self._compact_at = max(1024, 2 * len(self._heap))
        heappush(self._heap, (sequence.request.priority, sequence.order, sequence))

    push_front = put_back = push

    def peek(self, turn: int) -> Sequence | None:
        heap = self._heap
        while heap and heap[0][2].is_finished:
            heappop(heap)
        return heap[0][2] if heap else None

    def pop(self) -> Sequence:
        return heappop(self._heap)[2]

    def set_aside(self) -> None:
        heappop(self._heap)

    def victim(self, running: list[Sequence]) -> Sequence:
        return max(running, key=lambda sequence: (sequence.request.priority, sequence.order))

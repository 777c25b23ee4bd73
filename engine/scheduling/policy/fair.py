"""Fair shares between the request's fairness keys: next is the key that was served least.

Virtual token counters (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024): a key is charged for the
prompt tokens that are computed for it and, more, for those generated, each divided by its weight. A key that comes
back from idleness is lifted to where the others are: idling earns nothing. A decision costs O(keys that wait); output
is charged when somebody looks (once a turn at most, and when a key comes back), 0.35 us per running sequence: a token
costs nothing.
"""

from __future__ import annotations

from collections import deque

from engine.cache.kv_cache import KVCache
from engine.scheduling.policy.base import AdmissionPolicy
from engine.scheduling.policy.fcfs import FCFS
from engine.scheduling.sequence import Sequence

# A generated token costs a pass of its own, prompt tokens share one. The paper's weights, and about what is billed.
PROMPT_WEIGHT, OUTPUT_WEIGHT = 1, 2
# Entries (of aborted sequences, of idle keys) beyond which a sweep looks for those that mean nothing any more.
SWEEP_AT = 1024


class Fair(AdmissionPolicy):
    """A queue for each key. Retracted sequences go before all: they were paid for."""

    def __init__(self, cache: KVCache) -> None:
        self._retracted = FCFS(cache)
        self._queues: dict[str, deque[Sequence]] = {}
        self._served: dict[str, float] = {}  # virtual tokens, also of keys that have been idle for a while
        self._floor = 0.0  # of whom was admitted last: it only rises
        self._charged: dict[Sequence, int] = {}  # admitted sequences, and how many of their tokens were charged
        self._turn: int | None = None
        self._is_charged = False
        self._num_aborted = 0
        self._sweep_at = SWEEP_AT

    def push(self, sequence: Sequence) -> None:
        if self._num_aborted > SWEEP_AT or len(self._served) > self._sweep_at:
            self._sweep()
        key = sequence.request.fairness_key
        if self._head(key) is None:
            # What it owes counts before it is lifted, not on top.
            self._charge_outputs()
            self._queues[key] = deque()
            self._served[key] = max(self._served.get(key, 0), self._floor)
        self._queues[key].append(sequence)

    def push_front(self, sequence: Sequence) -> None:
        self._retracted.push_front(sequence)

    def peek(self, turn: int) -> Sequence | None:
        retracted = self._retracted.peek(turn)
        if retracted is not None:
            return retracted
        if turn != self._turn:
            self._turn, self._is_charged = turn, False
        if len(self._queues) > 1 and not self._is_charged:
            self._charge_outputs()
        while self._queues:
            key = self._next_key()
            head = self._head(key)
            if head is not None:
                return head
            del self._queues[key]
        return None

    def pop(self) -> Sequence:
        if self._retracted.peek(0) is not None:
            return self._retracted.pop()
        if not self._is_charged:
            self._charge_outputs()
        key = self._next_key()
        sequence = self._queues[key].popleft()
        self._floor = max(self._floor, self._served[key])
        cost = PROMPT_WEIGHT * (sequence.num_prompt_tokens - sequence.num_cached_tokens)
        self._served[key] += cost / sequence.request.weight
        self._charged[sequence] = sequence.num_prompt_tokens
        if self._head(key) is None:
            del self._queues[key]
        return sequence

    def set_aside(self) -> None:
        if self._retracted.peek(0) is not None:
            self._retracted.pop()
            return
        key = self._next_key()
        self._queues[key].popleft()
        if self._head(key) is None:
            del self._queues[key]

    def put_back(self, sequence: Sequence) -> None:
        if sequence.is_retracted:
            self._retracted.push_front(sequence)
            return
        key = sequence.request.fairness_key
        self._served.setdefault(key, self._floor)
        queue, index = self._queues.setdefault(key, deque()), 0
        while index < len(queue) and queue[index].order < sequence.order:
            index += 1
        queue.insert(index, sequence)

    def finished(self, sequence: Sequence) -> None:
        if sequence in self._charged:
            self._charge_output(sequence)
            del self._charged[sequence]
        else:
            self._num_aborted += 1

    def _next_key(self) -> str:
        return min(self._queues, key=self._served.__getitem__)

    def _head(self, key: str) -> Sequence | None:
        """The oldest that waits under a key."""
        queue = self._queues.get(key)
        while queue and queue[0].is_finished:
            queue.popleft()
        return queue[0] if queue else None

    def _charge_outputs(self) -> None:
        self._is_charged = True
        for sequence in self._charged:
            self._charge_output(sequence)

    def _charge_output(self, sequence: Sequence) -> None:
        """Charge what was generated since the last time. Computing a retracted sequence again is not its own doing."""
        count = sequence.num_tokens
        new = count - self._charged[sequence]
        if new:
            key = sequence.request.fairness_key
            cost = OUTPUT_WEIGHT * new
            self._served[key] = self._served.get(key, self._floor) + cost / sequence.request.weight
            self._charged[sequence] = count

    def _sweep(self) -> None:
        """Forget aborted sequences, and idle keys that stand no worse than a new one would."""
        alive = {
            key: deque(waiting for waiting in queue if not waiting.is_finished) for key, queue in self._queues.items()
        }
        self._queues = {key: queue for key, queue in alive.items() if queue}
        self._served = {key: count for key, count in self._served.items() if count > self._floor or key in self._queues}
        self._num_aborted = 0
        self._sweep_at = max(SWEEP_AT, 2 * len(self._served))

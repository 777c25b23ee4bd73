"""What an admission policy must answer, worked out anew at every question: no queues, no heaps, nothing put off.

Stands between the scheduler and its policy in a simulation.
"""

from __future__ import annotations

from collections import defaultdict

from engine.cache.kv_cache import KVCache
from engine.scheduling.policy import fair, lpm
from engine.scheduling.policy.base import AdmissionPolicy
from engine.scheduling.sequence import Sequence


class CheckedPolicy(AdmissionPolicy):
    """The policy `name`, every answer of it checked."""

    def __init__(self, name: str, policy: AdmissionPolicy, cache: KVCache) -> None:
        self.name = name
        self._policy = policy
        self._cache = cache
        self._waiting: list[Sequence] = []
        self._choice: Sequence | None = None
        self._matched_in: int | None = None
        # In which turn there were more than are ranked.
        self._many_in: int | None = None
        self._matches: dict[Sequence, int] = {}
        self._passed: defaultdict[Sequence, int] = defaultdict(int)
        self._served: defaultdict[str, int] = defaultdict(int)
        self._floor = 0
        self._charged: dict[Sequence, int] = {}
        # Who waits for an adapter's place, out of the policy's sight; and how many have passed whom since it first did.
        self.aside: list[Sequence] = []
        self.max_passed = 3
        self._num_passed: dict[Sequence, int] = {}

    def push(self, sequence: Sequence) -> None:
        self._charge()
        if self.name == "fair":
            key = sequence.request.fairness_key
            if key not in [other.request.fairness_key for other in self._alive() if other not in self._charged]:
                self._served[key] = max(self._served[key], self._floor)
        self._waiting.append(sequence)
        self._policy.push(sequence)

    def push_front(self, sequence: Sequence) -> None:
        assert sequence.is_retracted
        self._waiting.append(sequence)
        self._policy.push_front(sequence)

    def peek(self, turn: int) -> Sequence | None:
        self._charge()
        choice = self._policy.peek(turn)
        waiting = self._alive()
        if not waiting:
            assert choice is None, f"{choice} was chosen, but nobody waits"
            return None
        assert choice in waiting, f"{choice} was chosen, but {waiting} wait"
        self._check(choice, waiting, turn)
        self._choice = choice
        return choice

    def _check(self, choice: Sequence, waiting: list[Sequence], turn: int) -> None:
        retracted = [sequence for sequence in waiting if sequence.is_retracted]
        oldest = min(retracted or waiting, key=lambda sequence: sequence.order)
        best = oldest
        if self.name == "priority":
            best = min(waiting, key=lambda sequence: (sequence.request.priority, sequence.order))
        elif self.name == "lpm" and not retracted and self._passed[oldest] < lpm.MAX_PASSED:
            if len(self._waiting) > lpm.WINDOW:
                self._many_in = turn
            if turn != self._matched_in:
                self._match(waiting, turn)
            best = self._longest(waiting)
            if turn == self._many_in:
                if choice is oldest:
                    return  # too many to rank; those that were aborted may count, too
                if choice is not best:
                    # They were too many until somebody was admitted, and that may have changed the cache.
                    self._match(waiting, turn)
                    best = self._longest(waiting)
        elif self.name == "fair" and not retracted:
            key = choice.request.fairness_key
            least = min(self._served[sequence.request.fairness_key] for sequence in waiting)
            assert self._served[key] == least, f"{key!r} was served {self._served[key]}, somebody only {least}"
            best = min(
                (sequence for sequence in waiting if sequence.request.fairness_key == key), key=lambda one: one.order
            )
        assert choice is best, f"{self.name}: {choice} goes before {best}"

    def _match(self, waiting: list[Sequence], turn: int) -> None:
        self._matched_in = turn
        self._matches = {
            sequence: self._cache.match_length(sequence.matchable_ids, sequence.request.cache_root)
            for sequence in waiting
        }

    def _longest(self, waiting: list[Sequence]) -> Sequence:
        return max(waiting, key=lambda sequence: (self._matches[sequence], -sequence.order))

    def pop(self) -> Sequence:
        self._charge()
        sequence = self._policy.pop()
        self._waiting.remove(sequence)
        self._count_passed(sequence)
        fresh = [other for other in self._alive() if not other.is_retracted]
        oldest = min(fresh, key=lambda other: other.order, default=sequence)
        if not sequence.is_retracted and oldest.order < sequence.order:
            self._passed[oldest] += 1
        if sequence not in self._charged:
            key = sequence.request.fairness_key
            self._floor = max(self._floor, self._served[key])
            self._served[key] += fair.PROMPT_WEIGHT * (sequence.num_prompt_tokens - sequence.num_cached_tokens)
            self._charged[sequence] = sequence.num_prompt_tokens
        return sequence

    def set_aside(self) -> None:
        self._charge()
        choice = self._choice
        assert choice is not None and choice.request.adapter is not None, f"{choice} waits for no adapter"
        self._policy.set_aside()
        self._waiting.remove(choice)
        self.aside.append(choice)
        self._num_passed.setdefault(choice, 0)
        self._passed.clear()

    def put_back(self, sequence: Sequence) -> None:
        self._charge()
        self.aside.remove(sequence)
        self._waiting.append(sequence)
        self._policy.put_back(sequence)
        self._matched_in = None
        self._passed.clear()

    def victim(self, running: list[Sequence]) -> Sequence:
        assert len(running) > 1
        victim = self._policy.victim(running)
        by_importance = running
        if self.name == "priority":
            by_importance = sorted(running, key=lambda sequence: (sequence.request.priority, sequence.order))
        assert victim is by_importance[-1], f"{victim} was retracted and not {by_importance[-1]}"
        return victim

    def finished(self, sequence: Sequence) -> None:
        self._charge()
        self._charged.pop(sequence, None)
        self._policy.finished(sequence)

    def _count_passed(self, admitted: Sequence) -> None:
        """Nobody who waits for an adapter's place is passed too often."""
        self._num_passed.pop(admitted, None)
        self.aside = [sequence for sequence in self.aside if not sequence.is_finished]
        for sequence in self.aside:
            assert self._num_passed[sequence] < self.max_passed, f"{admitted} is one too many to pass {sequence}"
        for sequence in self._num_passed:
            self._num_passed[sequence] += 1

    def _alive(self) -> list[Sequence]:
        return [sequence for sequence in self._waiting if not sequence.is_finished]

    def _charge(self) -> None:
        if self.name != "fair":
            return
        for sequence, count in self._charged.items():
            new = sequence.num_tokens - count
            self._served[sequence.request.fairness_key] += fair.OUTPUT_WEIGHT * new
            self._charged[sequence] += new

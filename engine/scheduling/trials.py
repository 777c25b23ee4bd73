"""Trials: who made a step fail. Its sequences run again, half of them at a time, until one of them fails alone, and
again: a fault that passes is the device's, and nobody's doing.

Owned by the Scheduler, which admits nobody else while a trial is on and lets who was cleared wait: a step that fails
then has nobody in it but the group that is tried. One culprit among n costs 2 log2(n) + TRIES_ALONE - 1 steps at most,
a device that fails them all MAX_FAILURES + n.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from engine.scheduling.sequence import Sequence, SequenceStatus

# So often a sequence must fail alone, without getting past the place in between, to be guilty. Of a device that fails
# one step in fifty by itself, an innocent one would be blamed in one of 125,000 steps that it has alone.
TRIES_ALONE = 3
# Steps that fail without a suspect cleared between them: more is the device's doing (it has no memory, say), or many
# culprits stand beside each other. From then on everybody is tried alone, and only once: nobody ends by another's
# fault. Halving 4,096 sequences takes 12, two culprits beside each other six more.
MAX_FAILURES = 20


class Trials:
    """Groups of suspects, tried one group after the other. A suspect has `suspect_until`: computed tokens that it must
    reach in a step that succeeds."""

    def __init__(self) -> None:
        self._groups: deque[list[Sequence]] = deque()
        self._num_failures = 0

    @property
    def pending(self) -> bool:
        """Somebody is yet to be cleared or to fail."""
        while self._groups:
            group = self._groups[0]
            group[:] = [sequence for sequence in group if sequence.suspect_until and not sequence.is_finished]
            if group:
                return True
            self._groups.popleft()
        self._num_failures = 0
        return False

    def next(self) -> Sequence | None:
        """Whom to admit next, None where all of the group run (or have yet to give back their slots)."""
        if not self.pending:
            return None
        waiting = (one for one in self._groups[0] if one.status is SequenceStatus.WAITING)
        return next(waiting, None)

    def judge(self, possible: list[Sequence]) -> list[Sequence]:
        """A step failed, by one of these. Returns who is found guilty; the others are to be run again."""
        self._num_failures += 1
        for group in self._groups:
            group[:] = [sequence for sequence in group if sequence not in possible]
        suspects = [sequence for sequence in possible if not sequence.is_finished]
        is_alone, are_many = len(possible) == 1, self._num_failures > MAX_FAILURES
        if is_alone:
            possible[0].failed_alone += 1
        if is_alone and possible[0].failed_alone >= (1 if are_many else TRIES_ALONE):
            for sequence in suspects:
                sequence.suspect_until = 0
            return suspects
        size = 1 if are_many else (len(suspects) + 1) // 2
        for start in reversed(range(0, len(suspects), size or 1)):
            self._groups.appendleft(suspects[start : start + size])
        return []

    def succeeded(self, reached: Iterable[tuple[Sequence, int]]) -> None:
        """A step succeeded: how far it brought each of its sequences."""
        for sequence, end in reached:
            if sequence.suspect_until and end >= sequence.suspect_until:
                sequence.suspect_until = sequence.failed_alone = 0
                self._num_failures = 0

"""AdapterPlaces: which LoRA adapter has which index on the device, and who waits for one.

A sequence pins its adapter's index from its admission until nothing of it is in flight; an index that nobody pins is
given to the next adapter that needs one, the least recently used first. Owned by the Scheduler, which asks it whom to
admit next.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from engine.request import Adapter

if TYPE_CHECKING:
    from engine.scheduling.policy.base import AdmissionPolicy
    from engine.scheduling.sequence import Sequence

# A sequence that waits for an index is passed by at most so many admissions, and for at most so many seconds.
MAX_PASSED = 64
MAX_PASSED_S = 10.0
# So many are set aside at most: behind them nobody is looked at.
MAX_ASIDE = 256


class AdapterPlaces:
    """Indices 1..count. `num_admitted` counts admissions."""

    def __init__(self, count: int, now: Callable[[], float]) -> None:
        self.max_passed = MAX_PASSED
        self.num_admitted = 0
        self._now = now
        self._free = list(range(count, 0, -1))
        # By version: the index, how many pin it, and those that nobody pins, least recently used first.
        self._index: dict[int, int] = {}
        self._pins: dict[int, int] = {}
        self._unpinned: dict[int, None] = {}
        # Versions that keep their index when nobody pins it.
        self._kept: set[int] = set()
        # Unloaded while they were pinned.
        self._unloaded: set[int] = set()
        # What the next step takes to the device; None: the index is nobody's, and its memory on the host is free.
        self._loads: dict[int, Adapter | None] = {}
        # Who waits for an index, out of the policy's sight; and since which admission and when, also once it is back.
        self._aside: list[Sequence] = []
        self._since: dict[Sequence, tuple[int, float]] = {}
        # An index can be had that could not before, or another adapter is in its place.
        self._changed = False
        # Called where an index has become nobody's: between steps nobody would look.
        self.on_dropped: Callable[[], object] = lambda: None

    @property
    def pinned(self) -> dict[int, int]:
        """Versions that are in use, and by how many sequences."""
        return self._pins

    def has_room(self, adapter: Adapter | None) -> bool:
        """It is in place, or it can be put there."""
        return adapter is None or adapter.version in self._index or bool(self._free or self._unpinned)

    def pin(self, sequence: Sequence) -> int:
        """The index for a sequence that is admitted; 0 without an adapter. It must have room.

        Suspects do: their adapters were in one step together, and nobody else is admitted while they are tried.
        """
        self.num_admitted += 1
        adapter = sequence.request.adapter
        if adapter is None:
            return 0
        self._since.pop(sequence, None)
        version = adapter.version
        index = self._index.get(version)
        if index is None:
            index = self._index[version] = self._free.pop() if self._free else self._evict()
            self._loads[index] = adapter
            self._changed = True
        self._unpinned.pop(version, None)
        self._pins[version] = self._pins.get(version, 0) + 1
        return index

    def unpin(self, adapter: Adapter | None) -> None:
        """A sequence with it has left its slot."""
        if adapter is None:
            return
        version = adapter.version
        self._pins[version] -= 1
        if self._pins[version]:
            return
        del self._pins[version]
        self._changed = True
        if version not in self._kept:
            self._unpinned[version] = None
        if version in self._unloaded:
            self._unloaded.remove(version)
            self.unload(version)

    def keep(self, version: int) -> None:
        """Once it has an index it keeps it, until it is unloaded. Of fewer than there are indices."""
        self._kept.add(version)
        self._unpinned.pop(version, None)

    def unload(self, version: int) -> None:
        """Nobody will ask for it any more: its index goes first, as soon as nobody pins it."""
        self._kept.discard(version)
        if version in self._pins:
            self._unloaded.add(version)
        elif version in self._index:
            self._unpinned.pop(version, None)
            self._loads[self._index[version]] = None
            self._free.append(self._index.pop(version))
            self._changed = True
            self.on_dropped()

    def forget(self) -> None:
        """The device has lost all of them. Nobody may pin one."""
        assert not self._pins
        self._free += self._index.values()
        # Of those, too, that no step has taken there yet.
        self._loads = dict.fromkeys([*self._index.values(), *self._loads])
        self._index.clear()
        self._unpinned.clear()
        self._changed = True

    def take_loads(self) -> list[tuple[int, Any]]:
        """ForwardInput.adapter_loads of the step that is launched now; from then on they count as there, also where it
        fails."""
        loads, self._loads = self._loads, {}
        return [(index, adapter.weights) if adapter else (index, None) for index, adapter in loads.items()]

    def take_dropped(self) -> list[int]:
        """Indices that are nobody's, which the executor is told of now: no step is in flight that would tell it."""
        dropped = [index for index, adapter in self._loads.items() if adapter is None]
        for index in dropped:
            del self._loads[index]
        return dropped

    def next(self, policy: AdmissionPolicy, turn: int) -> Sequence | None:
        """Whom to admit next. Who waits for an index is set aside, and others pass: a few, and for a while."""
        if self._aside:
            self._review(policy)
        while (candidate := policy.peek(turn)) is not None:
            if self.has_room(candidate.request.adapter):
                return None if self._is_starving() else candidate
            if len(self._aside) >= MAX_ASIDE:
                return None
            policy.set_aside()
            self._aside.append(candidate)
            self._since.setdefault(candidate, (self.num_admitted, self._now()))
        return None

    def _evict(self) -> int:
        oldest = next(iter(self._unpinned))
        del self._unpinned[oldest]
        return self._index.pop(oldest)

    def _review(self, policy: AdmissionPolicy) -> None:
        """The policy gets back who may be admitted now, and decides anew."""
        self._aside = [sequence for sequence in self._aside if not sequence.is_finished]
        if self._changed:
            for sequence in self._aside:
                policy.put_back(sequence)
            self._aside = []
        self._changed = False
        if len(self._since) > 2 * MAX_ASIDE:
            self._since = {one: since for one, since in self._since.items() if not one.is_finished}

    def _is_starving(self) -> bool:
        """Somebody has been passed often enough, or for long enough."""
        if not self._aside:
            return False
        sinces = [self._since[sequence] for sequence in self._aside]
        admission, when = min(sinces)[0], min(since[1] for since in sinces)
        return self.num_admitted - admission >= self.max_passed or self._now() - when >= MAX_PASSED_S

"""Adapters that all ranks read at once, each its part, beside the steps: what rank 0 calls one that all have, and how
the others find theirs."""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from engine.distributed.ring import Ring
from engine.distributed.steps import COMMAND, read_words, write_words
from engine.executor.reading import Adapter, Reading, digest_of
from engine.ops.ranks import RanksEndedError

T = TypeVar("T", bound=Adapter)

# See Reading.
Say = Callable[[Any], list[Any]]


class LeadingAdapters:
    """Rank 0's, by numbers from 1 on. Read on any thread, asked for by the executor's.

    lock: held while all read one.
    """

    def __init__(self, ring: Ring, say: Say) -> None:
        self.lock = threading.Lock()
        self._ring, self._say = ring, say
        self._count = itertools.count(1)
        self._number_of: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        # Filled by finalisers, which may run within any line.
        self._gone: deque[int] = deque()
        self._taking = threading.Lock()

    def read(self, path: Path, read: Callable[[Reading], T]) -> T:
        """Have all ranks read it, this one by `read`. Raises AdapterError."""
        with self.lock:
            number = next(self._count)
            words = {"number": number, "path": str(path.absolute()), "gone": self.take_gone()}
            # Where the group is over, what follows says so.
            with contextlib.suppress(RanksEndedError):
                self._ring.send(write_words(COMMAND, words))
            reading = Reading(self._say, path)
            weights = reading.run(lambda: read(reading), digest_of)
        self._number_of[weights] = number
        weakref.finalize(weights, self._gone.append, number).atexit = False
        return weights

    def of(self, weights: Any | None) -> int:
        """0 for none."""
        return 0 if weights is None else self._number_of[weights]

    def take_gone(self) -> list[int]:
        """Numbers that nobody asks for again, each once: the steps that named them are through in all ranks."""
        with self._taking:
            return [self._gone.popleft() for _ in range(len(self._gone))]


class FollowedAdapters:
    """Another rank's parts, by rank 0's numbers, which are told once all ranks have read them. read: this one's."""

    def __init__(self, ring: Ring, say: Say, read: Callable[[Path, Reading], Any]) -> None:
        self._ring, self._say, self._read = ring, say, read
        self.parts: dict[int, Any] = {}
        self._has_read = threading.Condition()
        self._over = False

    def follow(self) -> None:
        """What rank 0 reads, at the same time; on a thread of its own. Until the group is over: raises RanksEndedError
        then, and whatever else it fails by, which is to end the group: nobody may wait for this thread."""
        try:
            while True:
                words = read_words(self._ring.receive())
                self.forget(words["gone"])
                path = Path(words["path"])
                reading = Reading(self._say, path)
                weights = reading.follow(functools.partial(self._read, path, reading), digest_of)
                if weights is not None:
                    with self._has_read:
                        self.parts[words["number"]] = weights
                        self._has_read.notify_all()
                del weights, reading
        finally:
            with self._has_read:
                self._over = True
                self._has_read.notify_all()

    def of(self, number: int) -> Any | None:
        """None for 0. Raises RanksEndedError where it does not come any more."""
        if not number:
            return None
        with self._has_read:
            # It has been read, if only just.
            self._has_read.wait_for(lambda: self._over or number in self.parts)
            if number not in self.parts:
                raise RanksEndedError("no adapters are read any more")
            return self.parts[number]

    def forget(self, numbers: Iterable[int]) -> None:
        """Nobody asks for these again."""
        with self._has_read:
            for number in numbers:
                self.parts.pop(number, None)

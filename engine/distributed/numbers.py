"""What rank 0 and the others call an adapter that all have read their part of."""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from typing import Any


class AdapterNumbers:
    """Rank 0's, from 1 on. Noted by threads that read, asked by the executor's."""

    def __init__(self) -> None:
        self._count = itertools.count(1)
        self._of: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._gone: deque[int] = deque()

    def next(self) -> int:
        """One that nobody has."""
        return next(self._count)

    def note(self, number: int, weights: Any) -> None:
        """These weights have it, as long as there are any."""
        self._of[weights] = number
        weakref.finalize(weights, self._gone.append, number).atexit = False

    def of(self, weights: Any | None) -> int:
        """0 for none."""
        return 0 if weights is None else self._of[weights]

    def take_gone(self) -> list[int]:
        """Numbers that nobody asks for again, each once."""
        return [self._gone.popleft() for _ in range(len(self._gone))]

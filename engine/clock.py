"""Time as a value that is passed in, so that a simulated run is a function of its seed; names for stretches of it."""

from __future__ import annotations

import asyncio
import heapq
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import ParamSpec, Protocol, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")
# Opens a named range in a profiler's time line.
RangeOf = Callable[[str], AbstractContextManager[None]]


class Timer(Protocol):
    """A call that is to come."""

    def cancel(self) -> None: ...


class Clock(Protocol):
    """Monotonic time in seconds."""

    def now(self) -> float: ...

    def call_later(self, seconds: float, callback: Callable[[], object]) -> Timer:
        """Call once, `seconds` from now, on the thread of the caller (the running event loop's)."""
        ...


class MonotonicClock:
    """The clock of the running server (`time.monotonic`)."""

    # The function itself: it is asked some times in every step.
    now = staticmethod(time.monotonic)

    def call_later(self, seconds: float, callback: Callable[[], object]) -> Timer:
        return asyncio.get_running_loop().call_later(seconds, callback)


class _ManualTimer:
    def __init__(self, callback: Callable[[], object]) -> None:
        self.callback: Callable[[], object] | None = callback

    def cancel(self) -> None:
        self.callback = None


class ManualClock:
    """A clock that moves only when told to; the simulator's and the tests' clock."""

    def __init__(self, start: float = 0.0) -> None:
        self._now = start
        self._timers: list[tuple[float, int, _ManualTimer]] = []
        self._num_timers = 0

    def now(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        """Calls of timers that are due happen in here, each at its own time."""
        assert seconds >= 0.0
        end = self._now + seconds
        while self._timers and self._timers[0][0] <= end:
            self._now, _, timer = heapq.heappop(self._timers)
            if timer.callback is not None:
                timer.callback()
        self._now = end

    def call_later(self, seconds: float, callback: Callable[[], object]) -> Timer:
        timer = _ManualTimer(callback)
        self._num_timers += 1
        heapq.heappush(self._timers, (self._now + max(0.0, seconds), self._num_timers, timer))
        return timer


def in_range(work: Callable[_P, _R], name: str, range_of: RangeOf) -> Callable[_P, _R]:
    """`work`, in a named range of a profiler's time line every time it is called."""

    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with range_of(name):
            return work(*args, **kwargs)

    return call

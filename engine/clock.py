"""Time as a value that is passed in, so that a simulated run is a function of its seed; names for stretches of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import ParamSpec, Protocol, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")
# Opens a named range in a profiler's time line.
RangeOf = Callable[[str], AbstractContextManager[None]]


class Clock(Protocol):
    """Monotonic time in seconds."""

    def now(self) -> float: ...


class MonotonicClock:
    """The clock of the running server (`time.monotonic`)."""

    def now(self) -> float:
        return time.monotonic()


class ManualClock:
    """A clock that moves only when told to; the simulator's and the tests' clock."""

    def __init__(self, start: float = 0.0) -> None:
        self._now = start

    def now(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        assert seconds >= 0.0
        self._now += seconds


def in_range(work: Callable[_P, _R], name: str, range_of: RangeOf) -> Callable[_P, _R]:
    """`work`, in a named range of a profiler's time line every time it is called."""

    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with range_of(name):
            return work(*args, **kwargs)

    return call

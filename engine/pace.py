"""Pace: how often a stream is flushed, so that the loop keeps up; and LoopWatch, which sees whether it does.

A write costs the loop ten times what a token costs it, so a loop that grows busy writes less often and more at once.
Loop thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from engine.forward import BoolArray
from engine.metrics import EngineMetrics
from engine.process import Collector

logger = logging.getLogger("oneloop.engine")

# Share of its time that the loop may spend before streams are flushed less often.
BUSY = 0.6
# Below this they are flushed more often again.
IDLE = 0.45
# Most seconds that a token waits for company.
MOST_WAIT_S = 0.1
# Between two looks at the loop.
LOOK_S = 0.1
# Lateness that is worth a line in the log, and seconds between two such lines.
LONG_LAG_S = 0.1
LOG_EVERY_S = 10.0

_SCHEDSTAT = Path("/proc/thread-self/schedstat")


class Pace:
    """interval: seconds between two events of a stream, 0 for every token at once. fixed: one that stays."""

    def __init__(self, fixed: float | None = None) -> None:
        self.interval = fixed or 0.0
        self._is_fixed = fixed is not None
        self._num_steps = 0
        # Turns that are owed, below one; and the row at which the search for the next begins.
        self._turns = 0.0
        self._first = 0

    def due(self, flushed_at: npt.NDArray[np.float64], listened: BoolArray, elapsed: float, now: float) -> BoolArray:
        """bool [n]: whose turn it is. flushed_at: of the rows of a step, -inf before the first flush.

        elapsed: seconds since the last step. Where the interval follows the load it is always the rows that have
        waited longest, as many as keep to it on average: no two streams fare differently, and writes are spread evenly.
        """
        self._num_steps += 1
        interval = self.interval
        due: BoolArray
        if self._is_fixed:
            due = flushed_at <= now - interval
            return due
        if elapsed >= interval:
            due = listened.copy()
            return due
        # The rows of steps that come seldom must not wait for others.
        due = flushed_at <= now - 2.0 * interval
        self._turns += np.count_nonzero(listened) * elapsed / interval
        count = int(self._turns)
        self._turns -= count
        if count >= len(flushed_at):
            due |= listened
        elif count:
            # Of rows that have waited equally long it must not always be the same.
            self._first = (self._first + count) % len(flushed_at)
            ages = np.roll(np.where(listened, flushed_at, math.inf), -self._first)
            due[(np.argpartition(ages, count)[:count] + self._first) % len(flushed_at)] = True
        return due

    def follow(self, utilisation: float, seconds: float) -> None:
        """The loop spent this share of the last `seconds`."""
        gap = seconds / self._num_steps if self._num_steps else seconds
        self._num_steps = 0
        if self._is_fixed:
            return
        if utilisation > BUSY:
            # Half of it at most may be other work than writing; then it comes in two steps, or in some more.
            self.interval = min(MOST_WAIT_S, max(self.interval, gap) * utilisation / BUSY)
        elif utilisation < IDLE and self.interval:
            self.interval *= 0.85
            if self.interval <= gap:
                self.interval = 0.0


class LoopWatch:
    """Looks at the running loop ten times a second, from `start` to `stop`. The pace and the metrics get what it sees,
    and who collects garbage.

    Utilisation is the share of time in which the loop's thread ran or waited for a processor, where the system tells
    the latter. Lag is how late a timer comes.
    """

    def __init__(self, metrics: EngineMetrics, pace: Pace, is_idle: Callable[[], bool] = lambda: False) -> None:
        """is_idle: no request runs or waits."""
        self._metrics = metrics
        self._pace = pace
        self._is_idle = is_idle
        self._collector = Collector()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._due_at = self._looked_at = self._used = self._waited = 0.0
        self._logged_at = -math.inf
        self._num_unlogged = 0
        self._tells = True

    def start(self, *, tells: bool = True) -> None:
        """tells: others wait for this loop, so a long lag is logged, and garbage collected when they do not."""
        self._tells = tells
        self._loop = asyncio.get_running_loop()
        self._looked_at, self._used = self._loop.time(), time.thread_time() + waited()
        self._wait(self._looked_at)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wait(self, now: float) -> None:
        assert self._loop is not None
        self._due_at, self._waited = now + LOOK_S, waited()
        self._timer = self._loop.call_at(self._due_at, self._look)

    def _look(self) -> None:
        assert self._loop is not None
        # The loop's own time is that of the turn's begin; what this turn did before is part of the lag.
        now, ran, queued = time.monotonic(), time.thread_time(), waited()
        used, in_queue = ran + queued, queued - self._waited
        lag, seconds = max(0.0, now - self._due_at), max(1e-9, now - self._looked_at)
        utilisation = min(1.0, (used - self._used) / seconds)
        self._looked_at, self._used = now, used
        self._metrics.loop_utilisation = utilisation
        self._metrics.loop_lag.observe(lag)
        self._pace.follow(utilisation, seconds)
        if lag > LONG_LAG_S and self._tells:
            self._on_long_lag(lag, now, in_queue)
        if self._tells:
            self._collector.look(now, is_idle=self._is_idle(), utilisation=utilisation)
        self._wait(time.monotonic())  # what was collected made nobody late

    def _on_long_lag(self, lag: float, now: float, in_queue: float) -> None:
        if now - self._logged_at < LOG_EVERY_S:
            self._num_unlogged += 1
            return
        more = f"; {self._num_unlogged} times more since the last line" if self._num_unlogged else ""
        # Not this server's fault, and nothing that it could mend.
        busy = (
            f" (the processors were busy: {1e3 * in_queue:.0f} ms in the queue for one)" if in_queue > lag / 2 else ""
        )
        logger.warning("the event loop was %.0f ms late%s%s", 1e3 * lag, busy, more)
        self._logged_at, self._num_unlogged = now, 0


def waited() -> float:
    """Seconds in which the calling thread waited for a processor."""
    seconds = 0.0
    with contextlib.suppress(OSError, ValueError, IndexError):
        # Linux: ns on a processor, ns in the queue for one, time slices.
        seconds = int(_SCHEDSTAT.read_bytes().split()[1]) / 1e9
    return seconds

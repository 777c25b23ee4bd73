"""Admission: how long a request would wait, by what was measured of late, and who is refused for it at the door.

The Engine tells it of every step, and asks it before a request is queued. An estimate is the waiting prompt tokens over
the rate at which prompts have been leaving the queue, which knows of slots, pages and step times alike; and then the
time to compute the request's own prompt. Without a queue nobody waits. Loop thread.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from engine.request import OverloadedError
from engine.scheduling.scheduler import Scheduler

# Seconds of the past that rates are of: long enough for several steps of a slow device, short enough to follow a load.
MEMORY_S = 8.0
# Less than this many seconds measured say nothing yet.
LEAST_S = 0.02
MAX_RETRY_AFTER_S = 600.0
# Of a promised first token, what an estimate may fill: the last in the queue must not miss it by the estimate's error.
MARGIN = 0.75


class Rate:
    """Tokens a second, of the last MEMORY_S seconds of those that count. None before there is one."""

    def __init__(self) -> None:
        self._tokens = self._seconds = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        keep = math.exp(-seconds / MEMORY_S)
        self._tokens, self._seconds = keep * self._tokens + tokens, keep * self._seconds + seconds

    @property
    def value(self) -> float | None:
        return self._tokens / self._seconds if self._seconds >= LEAST_S and self._tokens else None


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds until a request would be admitted, and until its first token."""

    wait: float
    ttft: float


class Admission:
    """ttft_slo_s, max_queue_wait_s: what an estimate may be at most; None for whatever it is."""

    def __init__(self, scheduler: Scheduler, ttft_slo_s: float | None, max_queue_wait_s: float | None) -> None:
        self._scheduler = scheduler
        self._ttft_slo, self._max_wait = ttft_slo_s, max_queue_wait_s
        # Prompt tokens, cached ones too, that left the queue while others stayed in it; those that were computed while
        # prompts were.
        self.admitted, self.computed = Rate(), Rate()
        self._seen: tuple[float, int, int, bool] | None = None

    def observe(self, now: float) -> None:
        """A step was committed."""
        counters, waits = self._scheduler.counters, self._scheduler.num_waiting > 0
        if self._seen is not None:
            then, admitted, computed, waited = self._seen
            if waited and waits:
                self.admitted.add(counters.prefix_cache_queries - admitted, now - then)
            if counters.prefill_tokens > computed:
                self.computed.add(counters.prefill_tokens - computed, now - then)
        self._seen = now, counters.prefix_cache_queries, counters.prefill_tokens, waits

    def rest(self) -> None:
        """Nothing runs: the time until the next step says nothing."""
        self._seen = None

    def estimate(self, num_tokens: int) -> Estimate | None:
        """For a request of that many prompt tokens; None where nothing has been measured."""
        computed = self.computed.value
        if computed is None:
            return None
        queued, ahead = self._scheduler.num_waiting_tokens, self._scheduler.num_prefilling_tokens
        leaving = self.admitted.value
        wait = queued / (leaving if leaving is not None else computed) if queued else 0.0
        return Estimate(wait, wait + (ahead + num_tokens) / computed)

    def retry_after(self) -> float:
        """Seconds until the queue that there is should be gone."""
        estimate = self.estimate(0)
        return 1.0 if estimate is None else min(MAX_RETRY_AFTER_S, max(1.0, estimate.wait))

    def check(self, num_tokens: int) -> None:
        """Raises OverloadedError (429) for a request that would wait for too long."""
        if self._ttft_slo is None and self._max_wait is None:
            return
        estimate = self.estimate(num_tokens)
        if estimate is None:
            return
        for name, expected, most, share in (
            ("to be admitted", estimate.wait, self._max_wait, 1.0),
            ("for its first token", estimate.ttft, self._ttft_slo, MARGIN),
        ):
            # A prompt that takes too long by itself, with nobody before it, would never be taken.
            if most is not None and expected > share * most and estimate.wait > 0.0:
                raise OverloadedError(
                    f"The server is overloaded: this request would wait for about {expected:.1f} seconds {name}; "
                    f"at most {most:g} are kept.",
                    retry_after=min(MAX_RETRY_AFTER_S, max(1.0, expected - share * most)),
                )

"""MemoryWatch: what is given up, stage by stage, as the process comes near the memory that it may have.

With --max-host-memory alone: at SHED of it host caches are emptied (kept responses, events of background responses,
compiled grammars), at REFUSE new requests get a 429, at UNAVAILABLE a 503. Loop thread; a look costs 20 us a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from engine.metrics import EngineMetrics
from engine.request import QueueFullError, UnavailableError

logger = logging.getLogger("oneloop.server")

SHED, REFUSE, UNAVAILABLE = 0.85, 0.92, 0.97
STAGES = ("calm", "shed", "refuse", "unavailable")
EVERY_S = 1.0
_PAGE = os.sysconf("SC_PAGE_SIZE")


def resident_bytes() -> int:
    """Of this process; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE
    except (OSError, IndexError, ValueError):
        return 0


class MemoryWatch:
    """most: bytes. shed: empties host caches; called once as a stage above calm is entered."""

    def __init__(
        self,
        most: int | None,
        shed: Callable[[], None],
        metrics: EngineMetrics,
        resident: Callable[[], int] = resident_bytes,
    ) -> None:
        self._most, self._shed, self._metrics, self._resident = most, shed, metrics, resident
        self.stage = 0

    def look(self) -> None:
        if self._most is None:
            return
        share, before = self._resident() / self._most, self.stage
        self.stage = sum(share >= bound for bound in (SHED, REFUSE, UNAVAILABLE))
        self._metrics.memory_stage = self.stage
        if self.stage > before:
            logger.warning("%.0f%% of --max-host-memory is used: %s", 100 * share, STAGES[self.stage])
            self._metrics.memory_sheds += 1
            self._shed()
            gc.collect()

    def check(self) -> None:
        """Raises what a new request gets: QueueFullError (429), UnavailableError (503)."""
        if self.stage < 2:
            return
        self._metrics.on_rejected("memory")
        if self.stage == 2:
            raise QueueFullError("The server is short of memory; please retry later.", retry_after=5 * EVERY_S)
        raise UnavailableError("The server is out of memory for requests; please retry later.")

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Look every EVERY_S seconds, inside of this block."""
        task = None if self._most is None else asyncio.create_task(self._run(), name="memory")
        try:
            yield
        finally:
            if task is not None:
                task.cancel()

    async def _run(self) -> None:
        while True:
            self.look()
            await asyncio.sleep(EVERY_S)

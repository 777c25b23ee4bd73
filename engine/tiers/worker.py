"""The disk tier's thread: pages and snapshots to files and back, one by one. Reads go before writes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from engine.executor.base import PageMemory
from engine.tiers.disk import PageStore, Row
from engine.tiers.names import Item

logger = logging.getLogger("oneloop.tiers")

# At the end, for pages that are yet to be written.
_LAST_WRITES_S = 3.0


@dataclass(slots=True, eq=False)
class Job:
    """What is to be read or written, in order; `then` is called on the loop when the thread has done with it. count:
    items that are done. Once `stopped` is set, no other is begun. What is in the store already counts as written, and
    so does a snapshot that has lost its place."""

    items: list[Item]
    then: Callable[[Job], None]
    count: int = 0
    stopped: bool = False

    @property
    def is_whole(self) -> bool:
        return self.count == len(self.items)


class Worker:
    """See the module. num_bytes_read, num_bytes_written: so far. threaded: False leaves it to the caller to `turn`."""

    def __init__(self, store: PageStore, *, threaded: bool = True) -> None:
        self.num_bytes_read = self.num_bytes_written = 0
        self.store = store
        # Of pages, and of snapshots: the memory, and room for one.
        self._memories: list[tuple[PageMemory, Row]] = []
        self._reads: deque[Job] = deque()
        self._writes: deque[Job] = deque()
        self._ready = threading.Condition()
        self._closes_at = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._work, name="kv-disk", daemon=True) if threaded else None
        if self._thread is not None:
            self._thread.start()

    def use(self, memory: PageMemory, states: PageMemory | None = None) -> None:
        """From now on; while there is no job."""
        memories = [memory] if states is None else [memory, states]
        self._memories = [(one, np.zeros((1, one.page_bytes), np.uint8)) for one in memories]

    def read(self, job: Job) -> None:
        """Fill its pages."""
        self._add(self._reads, job)

    def write(self, job: Job) -> None:
        """Keep its pages."""
        self._add(self._writes, job)

    def _add(self, jobs: deque[Job], job: Job) -> None:
        if self._thread is not None:
            self._loop = asyncio.get_running_loop()
        with self._ready:
            jobs.append(job)
            self._ready.notify()

    def close(self) -> None:
        """Blocks until what is to be written is, for a bounded time; nobody is told any more."""
        with self._ready:
            self._closes_at = time.monotonic() + _LAST_WRITES_S
            for job in self._reads:
                job.stopped = True
            self._ready.notify()
        if self._thread is not None:
            self._thread.join()

    def _work(self) -> None:
        while True:
            with self._ready:
                while not (self._reads or self._writes or self._closes_at):
                    self._ready.wait()
                if self._closes_at and not (self._writes and time.monotonic() < self._closes_at):
                    return
            ended = self.turn()
            if ended is not None and self._loop is not None:
                # RuntimeError: the loop is closed, and nobody waits any more.
                with contextlib.suppress(RuntimeError):
                    self._loop.call_soon_threadsafe(ended.then, ended)

    def turn(self) -> Job | None:
        """Carry an item of the first job, if there is one. Returns a job that ended."""
        with self._ready:
            jobs = self._reads or self._writes
            if not jobs:
                return None
            job = jobs[0]
        goes_on = not (job.stopped or job.is_whole)
        if goes_on:
            try:
                goes_on = self._read(job) if jobs is self._reads else self._write(job)
            except Exception:
                logger.exception("a page could not be carried")
                goes_on = False
        if goes_on:
            job.count += 1
            return None
        with self._ready:
            jobs.remove(job)
        return job

    def _read(self, job: Job) -> bool:
        item = job.items[job.count]
        memory, row = self._memories[item.is_state]
        if not self.store.read(item.name, row[0]):
            return False
        memory.copy_in(np.array([item.place], np.int32), row)
        self.num_bytes_read += row.nbytes
        return True

    def _write(self, job: Job) -> bool:
        item = job.items[job.count]
        if item.name in self.store:
            return True
        memory, row = self._memories[item.is_state]
        memory.copy_out(np.array([item.place], np.int32), row)
        if not item.is_there:
            return True  # others may have written to it meanwhile
        if not self.store.write(item.name, row[0]):
            return False
        self.num_bytes_written += row.nbytes
        return True

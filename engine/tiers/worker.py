"""The disk tier's thread: pages to files and back, page by page. Reads go before writes."""

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
from engine.forward import Int32Array
from engine.tiers.disk import PageStore

logger = logging.getLogger("oneloop.tiers")

# At the end, for pages that are yet to be written.
_LAST_WRITES_S = 3.0


@dataclass(slots=True, eq=False)
class Job:
    """Pages and their names, to be read or written in order; `then` is called on the loop when the thread has done with
    them. count: pages that are done. Once `stopped` is set, no other page is begun. Pages that are in the store already
    count as written."""

    pages: Int32Array
    names: list[bytes]
    then: Callable[[Job], None]
    count: int = 0
    stopped: bool = False

    @property
    def is_whole(self) -> bool:
        return self.count == len(self.names)


class Worker:
    """See the module. num_bytes_read, num_bytes_written: so far. threaded: False leaves it to the caller to `turn`."""

    def __init__(self, store: PageStore, *, threaded: bool = True) -> None:
        self.num_bytes_read = self.num_bytes_written = 0
        self.store = store
        self._memory: PageMemory | None = None
        self._row = np.zeros((1, 0), np.uint8)
        self._reads: deque[Job] = deque()
        self._writes: deque[Job] = deque()
        self._ready = threading.Condition()
        self._closes_at = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._work, name="kv-disk", daemon=True) if threaded else None
        if self._thread is not None:
            self._thread.start()

    def use(self, memory: PageMemory) -> None:
        """From now on; while there is no job."""
        self._memory, self._row = memory, np.zeros((1, memory.page_bytes), np.uint8)

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
        """Carry a page of the first job, if there is one. Returns a job that ended."""
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
        assert self._memory is not None
        if not self.store.read(job.names[job.count], self._row[0]):
            return False
        self._memory.copy_in(job.pages[job.count : job.count + 1], self._row)
        self.num_bytes_read += self._row.nbytes
        return True

    def _write(self, job: Job) -> bool:
        assert self._memory is not None
        name = job.names[job.count]
        if name in self.store:
            return True
        self._memory.copy_out(job.pages[job.count : job.count + 1], self._row)
        if not self.store.write(name, self._row[0]):
            return False
        self.num_bytes_written += self._row.nbytes
        return True

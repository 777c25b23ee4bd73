"""The tiers' thread: pages and snapshots to host memory, to files and back. Reads go before writes."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from engine.executor.base import DeviceMemory, PageMemory
from engine.tiers.disk import PageStore, Row
from engine.tiers.host import HostStore, rows_of
from engine.tiers.names import Item
from engine.tiers.watch import DISK, HOST, TierWatch

logger = logging.getLogger("oneloop.tiers")

# At the end, for pages that are yet to be written.
_LAST_WRITES_S = 3.0
_LAST_FILE_S = 2.0
# So many pages are carried between two looks at who has stopped waiting.
_MOST_AT_ONCE = 64
# Of names; the oldest are those that host memory is first to lose.
_MOST_SPILLS = 2**16


@dataclass(slots=True, eq=False)
class Job:
    """What is to be read or written, in order; `then` is called on the loop when the thread has done with it. count:
    items that are done. Once `stopped` is set, no other is begun; of one that was `given_up` nobody is told, and no
    memory is touched for it any more. What is in the store already counts as written, and
    so does a snapshot that has lost its place."""

    items: list[Item]
    then: Callable[[Job], None]
    count: int = 0
    stopped: bool = False
    given_up: bool = False

    @property
    def is_whole(self) -> bool:
        return self.count == len(self.items)


class Worker:
    """See the module. num_bytes_read, num_bytes_written: of files, so far; num_bytes_in, num_bytes_out: of host memory,
    to the device and from there. threaded: False leaves it to the caller to `turn`."""

    def __init__(self, store: PageStore | None, *, host: HostStore | None = None, threaded: bool = True) -> None:
        assert store is not None or host is not None
        self.num_bytes_read = self.num_bytes_written = self.num_bytes_in = self.num_bytes_out = 0
        self.disk, self.host = store, host
        self._watch: TierWatch | None = None
        # Of pages, and of snapshots: the memory, room for one, and how many are carried at once.
        self._memories: list[tuple[PageMemory, Row, int]] = []
        self._reads: deque[Job] = deque()
        self._writes: deque[Job] = deque()
        # What is in host memory and goes to the disk when there is nothing else to do: names, and whether a state's.
        self._spills: deque[tuple[bytes, bool]] = deque(maxlen=_MOST_SPILLS)
        self._ready = threading.Condition()
        self._closes_at = 0.0
        # Held while the memory is touched.
        self._carrying = threading.Lock()
        self._gave_up = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._work, name="kv-disk", daemon=True) if threaded else None
        if self._thread is not None:
            self._thread.start()

    @property
    def store(self) -> PageStore | HostStore:
        """Where names are looked up."""
        if self.host is not None:
            return self.host
        assert self.disk is not None
        return self.disk

    def watch(self, watch: TierWatch) -> None:
        """Tell it of all that comes and goes, from now on."""
        self._watch = watch
        if self.host is not None:
            self.host.on_removed = functools.partial(watch.went, HOST)
        if self.disk is not None:
            self.disk.on_removed = functools.partial(watch.went, DISK)

    def _tell(self, medium: str, name: bytes) -> None:
        if self._watch is not None:
            self._watch.came(medium, name)

    def use(self, memory: PageMemory, states: PageMemory | None = None, shares: Sequence[float] = (1.0,)) -> None:
        """From now on; while there is no job. shares: of host memory, for each. Raises StartupError."""
        memories = [memory] if states is None else [memory, states]
        if self.host is not None:
            self.host.use(memories, shares)
        old, self._memories = self._memories, []
        for kind, one in enumerate(memories):
            most = 1
            if self.host is not None:
                # What a batch has found there must not make room for the rest of it.
                most = min(_MOST_AT_ONCE, self.host.capacity(kind) // 2)
                most = min(most, one.rows_at_once) if isinstance(one, DeviceMemory) else 1
            self._memories.append((one, old[kind][1] if old else rows_of(one, 1)[0], max(1, most)))

    def read(self, job: Job) -> None:
        """Fill its pages."""
        self._add(self._reads, job)

    def write(self, job: Job) -> None:
        """Keep its pages."""
        self._add(self._writes, job)

    def give_up(self, jobs: Collection[Job]) -> None:
        """The thread hangs amid one of them: whenever it goes on, their memory is another's. Blocks while a page is
        being copied."""
        with self._carrying:
            for job in jobs:
                job.stopped = job.given_up = self._gave_up = True

    @property
    def hangs(self) -> bool:
        """What was given up has not come back: who asked for more would wait in vain."""
        if self._gave_up:
            with self._ready:
                self._gave_up = any(job.given_up for job in (*self._reads, *self._writes))
        return self._gave_up

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
            # It may hang in a file system that does.
            self._thread.join(_LAST_WRITES_S + _LAST_FILE_S)

    def _work(self) -> None:
        while True:
            with self._ready:
                while not (self._reads or self._writes or self._spills or self._closes_at):
                    self._ready.wait()
                if self._closes_at and not ((self._writes or self._spills) and time.monotonic() < self._closes_at):
                    return
            ended = self.turn()
            if ended is not None and not ended.given_up and self._loop is not None:
                # RuntimeError: the loop is closed, and nobody waits any more.
                with contextlib.suppress(RuntimeError):
                    self._loop.call_soon_threadsafe(ended.then, ended)

    def turn(self) -> Job | None:
        """Carry some items of the first job, if there is one, or something to the disk. Returns a job that ended."""
        with self._ready:
            jobs = self._reads or self._writes
            job = jobs[0] if jobs else None
        count = 0
        if job is None or not (job.stopped or job.is_whole):
            try:
                if job is None:
                    self._spill()
                else:
                    count = self._read(job) if jobs is self._reads else self._write(job)
            except Exception:
                logger.exception("a page could not be carried")
        if job is None:
            return None
        if count:
            job.count += count
            return None
        with self._ready:
            jobs.remove(job)
        return job

    def _batch(self, job: Job) -> tuple[int, list[Item]]:
        """The next items of a job that are carried at once, of one kind."""
        kind = job.items[job.count].is_state
        items = job.items[job.count : job.count + self._memories[kind][2]]
        return kind, list(itertools.takewhile(lambda item: item.is_state == kind, items))

    def _read(self, job: Job) -> int:
        """Returns how many came."""
        kind, items = self._batch(job)
        rows = []
        for item in items:
            row = self._from_disk(item.name, kind) if self.host is None else self._at_hand(self.host, item.name, kind)
            if row is None:
                break
            rows.append(row)
        with self._carrying:
            if not rows or job.given_up:
                return 0
            self._bring(kind, items[: len(rows)], rows)
            if self.host is not None:
                self.num_bytes_in += sum([row.nbytes for row in rows])
        return len(rows)

    def _from_disk(self, name: bytes, kind: int, into: Row | None = None) -> Row | None:
        row = self._memories[kind][1] if into is None else into
        if self.disk is None or not self.disk.read(name, row):
            return None
        self.num_bytes_read += row.nbytes
        self._tell(DISK, name)
        return row

    def _at_hand(self, host: HostStore, name: bytes, kind: int) -> Row | None:
        """A row of host memory with that, which comes from the disk if it is not there."""
        if (row := host.get(name, kind)) is not None:
            host.touch([name])
            return row
        if self.disk is None or name not in self.disk:
            return None
        row = host.take(kind)
        if self._from_disk(name, kind, row) is None:
            host.give(kind, row)
            return None
        host.put(name, kind, row)
        self._tell(HOST, name)
        return row

    def _write(self, job: Job) -> int:
        """Returns how many went."""
        kind, items = self._batch(job)
        new = [item for item in items if item.name not in self.store]
        if not new:
            return len(items)
        if self.host is not None:
            return len(items) if self._to_host(self.host, job, kind, new) else 0
        row = self._memories[kind][1]
        if not self._take_for(job, kind, new, [row]):
            return 0
        # else others may have written to it meanwhile
        return int(not new[0].is_there or self._to_disk(new[0].name, row))

    def _to_host(self, host: HostStore, job: Job, kind: int, items: list[Item]) -> bool:
        rows = [host.take(kind) for _ in items]
        taken = False
        try:
            taken = self._take_for(job, kind, items, rows)
        finally:
            for row in () if taken else rows:
                host.give(kind, row)
        if not taken:
            return False
        self.num_bytes_out += sum([row.nbytes for row in rows])
        for item, row in zip(items, rows, strict=True):
            if not item.is_there:
                host.give(kind, row)
                continue
            host.put(item.name, kind, row)
            self._tell(HOST, item.name)
            if self.disk is not None:
                self._spills.append((item.name, item.is_state))
        return True

    def _to_disk(self, name: bytes, row: Row) -> bool:
        assert self.disk is not None
        if not self.disk.write(name, row):
            return False
        self.num_bytes_written += row.nbytes
        self._tell(DISK, name)
        return True

    def _spill(self) -> None:
        """What has left host memory before its turn is not kept."""
        if self._spills and self.host is not None and self.disk is not None:
            name, kind = self._spills.popleft()
            row = self.host.get(name, kind)
            if row is not None and name not in self.disk:
                self._to_disk(name, row)

    def _take_for(self, job: Job, kind: int, items: list[Item], rows: list[Row]) -> bool:
        """False where the memory is not to be touched any more."""
        with self._carrying:
            if not job.given_up:
                self._take(kind, items, rows)
            return not job.given_up

    def _take(self, kind: int, items: list[Item], rows: list[Row]) -> None:
        """From the memory."""
        memory, places = self._memories[kind][0], np.array([item.place for item in items], np.int32)
        if isinstance(memory, DeviceMemory):
            memory.copy_rows_out(places, rows)
        else:
            memory.copy_out(places, rows[0][None])

    def _bring(self, kind: int, items: list[Item], rows: list[Row]) -> None:
        """To the memory."""
        memory, places = self._memories[kind][0], np.array([item.place for item in items], np.int32)
        if isinstance(memory, DeviceMemory):
            memory.copy_rows_in(places, rows)
        else:
            memory.copy_in(places, rows[0][None])

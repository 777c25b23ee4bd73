"""A tier in a simulation: the real one, whose thread is replaced by the simulator's lot.

What is kept lies in host memory; pages are carried one by one between the phases of a tick, while steps are in flight,
and whoever asked may be told of it much later.
"""

from __future__ import annotations

from collections import OrderedDict
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from engine.config import TierOptions
from engine.request import Request
from engine.scheduling.sequence import Sequence, SequenceStatus
from engine.tiers.host import HostStore
from engine.tiers.names import Item
from engine.tiers.tier import DiskTier
from engine.tiers.worker import Job, Worker

if TYPE_CHECKING:
    from tests.sim.simulator import Simulator


Row = npt.NDArray[np.uint8]


class MemoryStore:
    """What the tier asks of a PageStore, without files: at most max_files. The longest unused go first."""

    num_corrupt = num_failed = 0

    def __init__(self, max_files: int) -> None:
        self.max_files = max_files
        # By name. The longest unused first.
        self._files: OrderedDict[bytes, Row] = OrderedDict()

    @property
    def bytes(self) -> int:
        return sum(row.nbytes for row in self._files.values())

    def __contains__(self, name: bytes) -> bool:
        return name in self._files

    def __len__(self) -> int:
        return len(self._files)

    def read(self, name: bytes, into: Row) -> bool:
        """Fill it. False where the file is not there, or of another size."""
        row = self._files.get(name)
        if row is None or into.nbytes != row.nbytes:
            return False
        into[:] = row
        self._files.move_to_end(name)
        return True

    def write(self, name: bytes, data: Row) -> bool:
        """Keep a copy, in the place of the longest unused where there is no other."""
        self._files[name] = data.copy()
        self._files.move_to_end(name)
        if len(self._files) > self.max_files:
            self._files.popitem(last=False)
        return True


class WatchedMemory:
    """The device's, which notes whose page was brought where."""

    def __init__(self, simulator: Simulator, worker: SimulatedWorker) -> None:
        self._simulator, self._worker = simulator, worker
        self._inner = simulator.executor.page_memory()
        self.page_bytes, self.layout = self._inner.page_bytes, self._inner.layout
        self.whose: dict[bytes, Any] = {}

    def copy_out(self, pages: Any, into: Any) -> None:
        self._inner.copy_out(pages, into)
        for page, name in zip(pages.tolist(), self._worker.names_at_hand, strict=True):
            self.whose[name] = self._simulator.page_namespace.get(page)

    def copy_in(self, pages: Any, data: Any) -> None:
        free = self._simulator.scheduler.kv_cache.is_free()
        for page, name in zip(pages.tolist(), self._worker.names_at_hand, strict=True):
            assert not free[page - 1], f"page {page}, which is nobody's, is filled"
            self._simulator.page_namespace[page] = self.whose[name]
        self._inner.copy_in(pages, data)


class DistantMemory(WatchedMemory):
    """As of a device with memory of its own: some pages are carried at once, from and to certain rows alone."""

    rows_at_once = 3

    def __init__(self, simulator: Simulator, worker: SimulatedWorker) -> None:
        super().__init__(simulator, worker)
        self._lent: list[Row] = []

    def rows(self, count: int) -> Row:
        """See DeviceMemory."""
        rows = np.zeros((count, self.page_bytes), np.uint8)
        self._lent.append(rows)
        return rows

    def copy_rows_out(self, pages: Any, rows: list[Row]) -> None:
        """See DeviceMemory."""
        data = np.zeros((len(rows), self.page_bytes), np.uint8)
        self._check(pages, rows)
        self.copy_out(pages, data)
        for row, one in zip(rows, data, strict=True):
            row[:] = one

    def copy_rows_in(self, pages: Any, rows: list[Row]) -> None:
        """See DeviceMemory."""
        self._check(pages, rows)
        self.copy_in(pages, np.stack(rows))

    def _check(self, pages: Any, rows: list[Row]) -> None:
        assert len(pages) == len(rows) <= self.rows_at_once
        places = [row.ctypes.data for row in rows]
        assert len(set(places)) == len(places), "two pages share a row"
        assert all(any(np.shares_memory(row, lent) for lent in self._lent) for row in rows)


class SimulatedWorker(Worker):
    """Carries a page when it is told to."""

    names_at_hand: list[bytes]

    def _take(self, kind: int, items: list[Item], rows: list[Row]) -> None:
        self.names_at_hand = [item.name for item in items]
        super()._take(kind, items, rows)

    def _bring(self, kind: int, items: list[Item], rows: list[Row]) -> None:
        self.names_at_hand = [item.name for item in items]
        super()._bring(kind, items, rows)


class SimulatedTier:
    """See the module."""

    def __init__(self, simulator: Simulator, seed: int) -> None:
        options = simulator.options
        self._simulator, self._random = simulator, Random(f"tier {seed}")
        self._eagerness = options.tier_eagerness
        store: Any = MemoryStore(options.tier_pages)
        size, host = simulator.executor.page_memory().page_bytes, None
        if options.host_pages:
            rows = options.host_pages
            if (states := simulator.executor.state_memory()) is not None:
                # As many bytes as the device divides between that many pages and their states.
                count = options.num_snapshots or 0
                size += -(-states.page_bytes * count // options.num_pages)
                # Less has no room for two of either, which is an error at start.
                rows = max(rows, -(-2 * options.num_pages // count) + 1)
            host = HostStore(rows * size, store if options.has_disk else None)
        self.worker = SimulatedWorker(store if options.has_disk else None, host=host, threaded=False)
        memory = (WatchedMemory if host is None else DistantMemory)(simulator, self.worker)

        class Device:
            @staticmethod
            def page_memory() -> WatchedMemory:
                return memory

            state_memory = staticmethod(simulator.executor.state_memory)

        device: Any = Device()
        self.tier = DiskTier(
            TierOptions(None, 0, options.tier_timeout_s),
            device,
            simulator.lending,
            simulator.clock,
            received=self.received,
            wake=lambda: None,
            weights=lambda directory: "weights",
            worker=self.worker,
            least_tokens=0,
        )
        self._told: set[Sequence] = set()
        self._ended: list[Job] = []

    @property
    def is_busy(self) -> bool:
        return bool(self.tier._jobs or self._simulator.scheduler.num_receiving)

    def promises(self, request: Request) -> bool:
        return self.tier.promises(request)

    def receive(self, sequence: Sequence) -> None:
        self.tier.receive(sequence)
        assert sequence.status in (SequenceStatus.RECEIVING, SequenceStatus.FINISHED), "told before it was asked"

    def received(self, sequence: Sequence) -> None:
        assert sequence not in self._told, f"{sequence} is told twice"
        self._told.add(sequence)
        self._simulator.scheduler.received(sequence)

    def keep(self, sequence: Sequence) -> None:
        self.tier.keep(sequence)

    def turn(self, *, hurry: bool = False) -> None:
        """Some pages are carried, and some who asked are told."""
        while hurry or self._random.random() < self._eagerness:
            if (job := self.worker.turn()) is not None:
                self._ended.append(job)
            elif hurry and not (self.worker._reads or self.worker._writes or self.worker._spills):
                break
        while self._ended and (hurry or self._random.random() < self._eagerness):
            job = self._ended.pop(0)
            job.then(job)

    def check(self) -> None:
        """Who receives has been told of nothing yet."""
        for sequence in self._told:
            assert sequence.status is not SequenceStatus.RECEIVING, f"{sequence} was told and waits on"

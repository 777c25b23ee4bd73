"""HostStore: pages of a device's KV memory in page-locked host memory, by name; the longest unused go first.

The tier's one thread fills and reads its rows; `__contains__` and `touch` are any thread's. Below it may be a
PageStore, which gets what comes here and has what is here no more.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence

import numpy as np

from engine.config import StartupError
from engine.executor.base import DeviceMemory, PageMemory
from engine.tiers.disk import PageStore, Row

FLAG = "--kv-host-gb"
# Of page-locked memory: what allocators round up to powers of two is asked for in such pieces.
_SLAB_BYTES = 2**28


class HostStore:
    """See the module. max_bytes: of all rows, which are taken by the first `use`, and never given back.

    num_evicted: rows that made room for others.
    """

    def __init__(self, max_bytes: int, below: PageStore | None = None) -> None:
        self.max_bytes, self.below = max_bytes, below
        self.num_evicted = 0
        # Told of each that goes.
        self.on_removed: Callable[[bytes], None] | None = None
        self._lock = threading.Lock()
        # By kind (pages, states): rows that hold nothing, how many there are, and bytes of one.
        self._free: list[list[Row]] = []
        self._counts: list[int] = []
        self._sizes: list[int] = []
        # By kind and name. The longest unused first.
        self._rows: list[OrderedDict[bytes, Row]] = []

    def use(self, memories: Sequence[PageMemory], shares: Sequence[float]) -> None:
        """Take rows for what these memories hold, each its share of all bytes; at first. Raises StartupError."""
        if self._sizes:
            assert self._sizes == [memory.page_bytes for memory in memories]
            return
        counts = [
            int(self.max_bytes * share) // memory.page_bytes for memory, share in zip(memories, shares, strict=True)
        ]
        if min(counts) < 2:
            least = max(2 * memory.page_bytes / share for memory, share in zip(memories, shares, strict=True))
            raise StartupError(f"{FLAG} must be at least {least / 1e9:.2g} for this model: less holds no two pages")
        for memory, count in zip(memories, counts, strict=True):
            at_once = max(1, _SLAB_BYTES // memory.page_bytes)
            free: list[Row] = []
            try:
                while len(free) < count:
                    free += list(rows_of(memory, min(at_once, count - len(free))))
            except StartupError as error:
                raise StartupError(f"{FLAG} {self.max_bytes / 1e9:g}: {error}") from error
            self._free.append(free)
            self._counts.append(count)
            self._sizes.append(memory.page_bytes)
            self._rows.append(OrderedDict())

    def capacity(self, kind: int) -> int:
        """Rows of a kind."""
        return self._counts[kind]

    def __contains__(self, name: bytes) -> bool:
        return self.is_here(name) or (self.below is not None and name in self.below)

    def is_here(self, name: bytes) -> bool:
        """Not only below."""
        return any(name in rows for rows in self._rows)

    def __len__(self) -> int:
        """Whether anything is to be had, and about how much."""
        return self.num_rows + (0 if self.below is None else len(self.below))

    @property
    def num_rows(self) -> int:
        """Pages and states that are here."""
        return sum(map(len, self._rows))

    @property
    def num_bytes(self) -> int:
        """Of what is here."""
        return sum(len(rows) * size for rows, size in zip(self._rows, self._sizes, strict=True))

    def touch(self, names: Collection[bytes]) -> None:
        """They are used, wherever else they are."""
        with self._lock:
            for rows in self._rows:
                for name in names:
                    with contextlib.suppress(KeyError):
                        rows.move_to_end(name)

    # ---- the thread's

    def get(self, name: bytes, kind: int) -> Row | None:
        """The row of that name, which stays that until the next `take`s have reached it."""
        with self._lock:
            return self._rows[kind].get(name)

    def take(self, kind: int) -> Row:
        """A row that holds nothing any more: `put` or `give` it."""
        with self._lock:
            if self._free[kind]:
                return self._free[kind].pop()
            self.num_evicted += 1
            name, row = self._rows[kind].popitem(last=False)
        if self.on_removed is not None:
            self.on_removed(name)
        return row

    def put(self, name: bytes, kind: int, row: Row) -> None:
        """It holds what is of that name."""
        with self._lock:
            assert name not in self._rows[kind]
            self._rows[kind][name] = row

    def give(self, kind: int, row: Row) -> None:
        """It holds nothing."""
        with self._lock:
            self._free[kind].append(row)


def rows_of(memory: PageMemory, count: int) -> Sequence[Row]:
    """Host memory for so many pages, from and to which the memory's are copied: uint8 [page_bytes] each."""
    if isinstance(memory, DeviceMemory):
        return list(memory.rows(count))
    return list(np.zeros((count, memory.page_bytes), np.uint8))

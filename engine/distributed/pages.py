"""KV memory that is divided over ranks on GPUs, as bytes: a page is what all ranks have of it, one behind the other.

Rank 0 has the DeviceMemory that others know, and says which pages are to be copied. All ranks copy their parts at once,
the others' between their devices and the group's shared memory. Beside the steps, on threads of their own.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.config import StartupError
from engine.distributed import steps
from engine.distributed.device_group import RankedGroup
from engine.distributed.ring import DATA_AT, LAST_BYTES, PAGES, Ring
from engine.executor.cuda_pages import DevicePages, OutOfMemoryError
from engine.forward import DeviceLostError, Int32Array
from engine.ops.ranks import RanksEndedError

Rows = npt.NDArray[np.uint8]

OF_PAGES, OF_STATES = "pages", "states"
# Opens the memory of one rank; None where the model has none of that kind.
Open = Callable[[], DevicePages | None]


def _between(ring: Ring, rank: int) -> Rows:
    """Where a rank's parts of pages lie between two devices."""
    return ring.ranks.section(rank)[DATA_AT:-LAST_BYTES]


def _carry(act: Callable[[], Any]) -> list[Any]:
    """What a rank says of what it was to do: why it cannot, where it may be asked again, and what it has found."""
    try:
        return [None, act()]
    except StartupError as error:
        return [str(error), None]
    except OutOfMemoryError as error:
        return [f"no device memory to copy pages: {' '.join(str(error).split())[:200]}", None]


class Carrier:
    """Rank 0's end. cleansed: how often all ranks have been told to take what is no number out of pages, which is over
    in all of them before anything is copied."""

    def __init__(self, group: RankedGroup) -> None:
        self.ring = group.ring.beside[PAGES]
        self.cleansed = 0
        self.lock = threading.Lock()
        self._group = group

    def all_do(self, own: Callable[[], Any], **words: Any) -> list[Any]:
        """Have all ranks do something, this one by `own`: what each says of it. Whoever calls holds the lock. Raises
        StartupError where one cannot, DeviceLostError where the group is over, and whatever else `own` fails by: what
        the others say of it would be taken for their answers to the next thing, so that ends the group."""
        try:
            self.ring.send(steps.write_words(steps.COMMAND, {**words, "cleansed": self.cleansed}))
            answers = self.ring.exchange(_carry(own))
        except RanksEndedError:
            raise DeviceLostError(self._group.why()) from None
        except BaseException as error:
            what = " ".join(str(error).split())[:300]
            self._group.fail(f"rank 0 failed as pages were copied: {type(error).__name__}: {what}")
            raise
        for failure, _ in answers:
            if failure is not None:
                raise StartupError(failure)
        return [answer for _, answer in answers]


class CarryingRank:
    """Another rank's end. open_memory: by kind. wait: until pages have been cleansed so often."""

    def __init__(self, ring: Ring, open_memory: dict[str, Open], wait: Callable[[int], None]) -> None:
        self._ring, self._open, self._wait = ring, open_memory, wait
        self._memories: dict[str, DevicePages] = {}

    def follow(self) -> None:
        """Until the group is over: raises RanksEndedError then, and whatever a copy fails by."""
        while True:
            words = steps.read_words(self._ring.receive())
            self._wait(words.pop("cleansed"))
            self._ring.exchange(_carry(functools.partial(self._obey, **words)))

    def _obey(self, do: str, kind: str, pages: Sequence[int] = ()) -> list[Any] | None:
        if do == "open":
            self._memories.pop(kind, None)
            if (memory := self._open[kind]()) is not None:
                self._memories[kind] = memory
            return _said_of(memory)
        memory, which = self._memories[kind], np.array(pages, np.int32)
        count = len(pages) * memory.page_bytes
        rows = _between(self._ring, self._ring.rank)[:count].reshape(len(pages), memory.page_bytes)
        if do == "out":
            memory.copy_out(which, rows)
        else:
            memory.copy_in(which, rows)
        return None


def _said_of(memory: DevicePages | None) -> list[Any] | None:
    return None if memory is None else [memory.page_bytes, memory.layout]


def open_pages(carrier: Carrier, kind: str, open_own: Open, pinned: Callable[[int], Rows]) -> RankedPages | None:
    """The memory of all ranks; None where the model has none of that kind. Raises StartupError."""
    found: list[DevicePages | None] = []

    def own() -> list[Any] | None:
        found.append(open_own())
        return _said_of(found[0])

    with carrier.lock:
        said = carrier.all_do(own, do="open", kind=kind)
    [memory] = found
    if memory is None:
        return None
    sizes, layouts = zip(*said, strict=True)
    return RankedPages(carrier, kind, memory, sizes, layouts, pinned)


class RankedPages:
    """A DeviceMemory. own: this rank's. sizes, layouts: of every rank's. pinned: page-locked memory, so many bytes."""

    def __init__(
        self,
        carrier: Carrier,
        kind: str,
        own: DevicePages,
        sizes: Sequence[int],
        layouts: Sequence[str],
        pinned: Callable[[int], Rows],
    ) -> None:
        self._carrier, self._kind, self._own, self._pinned = carrier, kind, own, pinned
        self.page_bytes = sum(sizes)
        self.layout = f"{len(sizes)} ranks: {', '.join(layouts)}"
        ends = [0, *itertools.accumulate(sizes)]
        self._parts = [slice(begin, end) for begin, end in itertools.pairwise(ends)]
        self._sizes = list(sizes)
        room = len(_between(carrier.ring, 0)) // max(sizes)
        if not room:
            raise StartupError(f"{kind} of {max(sizes) / 2**20:.0f} MiB a rank do not fit between two ranks")
        self.rows_at_once = min(own.rows_at_once, room)

    def rows(self, count: int) -> Rows:
        """See DeviceMemory."""
        try:
            return self._pinned(count * self.page_bytes).reshape(count, self.page_bytes)
        except RuntimeError as error:
            size = count * self.page_bytes / 1e9
            raise StartupError(f"no {size:.2g} GB of page-locked memory: {str(error).splitlines()[0]}") from error

    def copy_rows_out(self, pages: Int32Array, rows: Sequence[Rows]) -> None:
        """See DeviceMemory."""
        for some, into in self._batches(pages, rows):
            mine = [row[self._parts[0]] for row in into]
            with self._carrier.lock:
                self._all("out", some, functools.partial(self._own.copy_rows_out, some, mine))
                self._take(into)

    def copy_rows_in(self, pages: Int32Array, rows: Sequence[Rows]) -> None:
        """See DeviceMemory."""
        for some, data in self._batches(pages, rows):
            mine = [row[self._parts[0]] for row in data]
            with self._carrier.lock:
                self._give(data)
                self._all("in", some, functools.partial(self._own.copy_rows_in, some, mine))

    def copy_out(self, pages: Int32Array, into: Rows) -> None:
        """See PageMemory."""
        for some, rows in self._batches(pages, into):
            mine = np.asarray(rows)[:, self._parts[0]]
            with self._carrier.lock:
                self._all("out", some, functools.partial(self._own.copy_out, some, mine))
                self._take(rows)

    def copy_in(self, pages: Int32Array, data: Rows) -> None:
        """See PageMemory."""
        for some, rows in self._batches(pages, data):
            mine = np.asarray(rows)[:, self._parts[0]]
            with self._carrier.lock:
                self._give(rows)
                self._all("in", some, functools.partial(self._own.copy_in, some, mine))

    def regions(self) -> list[tuple[int, int, int]]:
        """See PageMemory."""
        return self._own.regions()

    def _batches(self, pages: Int32Array, rows: Any) -> list[tuple[Int32Array, Any]]:
        each = self.rows_at_once
        return [(pages[at : at + each], rows[at : at + each]) for at in range(0, len(pages), each)]

    def _all(self, do: str, pages: Int32Array, own: Callable[[], None]) -> None:
        self._carrier.all_do(own, do=do, kind=self._kind, pages=pages.tolist())

    def _take(self, rows: Sequence[Rows]) -> None:
        """Others' parts of pages that have been copied out."""
        for rank, part in enumerate(self._parts[1:], 1):
            size = self._sizes[rank]
            between = _between(self._carrier.ring, rank)[: len(rows) * size].reshape(len(rows), size)
            for row, own in zip(rows, between, strict=True):
                row[part] = own

    def _give(self, rows: Sequence[Rows]) -> None:
        """To the others what they are to copy in."""
        for rank, part in enumerate(self._parts[1:], 1):
            size = self._sizes[rank]
            between = _between(self._carrier.ring, rank)[: len(rows) * size].reshape(len(rows), size)
            for row, own in zip(rows, between, strict=True):
                own[:] = row[part]

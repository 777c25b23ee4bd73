"""The memory of the fake device: hashes in KV cells, read through page tables as a kernel would, and recurrent states.

Used by fake.py alone. Whatever is read is checked against what it was written for. Steps of the simulator have a few
rows: plain lists take a fraction of what array operations cost there.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt

from engine.forward import Int32Array
from engine.groups import Chunk

UInt64Array = npt.NDArray[np.uint64]

MASK = 2**64 - 1
# Finalizer of splitmix64 (Steele, Lea, Flood 2014): every input bit flips every output bit half of the time.
MIX_1, MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
TOKEN, POSITION, ROUND = 0x9E3779B97F4A7C15, 0xD1B54A32D192ED03, 0x8CB92BA72F3D8DD7
STATE = 0xA0761D6478BD642F


def mix_int(x: int) -> int:
    x = ((x ^ (x >> 30)) * MIX_1) & MASK
    x = ((x ^ (x >> 27)) * MIX_2) & MASK
    return x ^ (x >> 31)


def round_of(group: int) -> int:
    """So that equal tokens leave other cells in another group."""
    return (group + 1) * ROUND & MASK


def combine_ints(values: Sequence[int]) -> int:
    """One number of one in each memory group."""
    result = values[0]
    for value in values[1:]:
        result = mix_int((result * ROUND + value) & MASK)
    return result


class States:
    """Recurrent states with the number of tokens that each is of (-1: none), and whether a failed step is in it.

    A slot that stands in several rows of a step brings drafts: `settle` says how many of those rows count.
    """

    def __init__(self, count: int) -> None:
        self.value = [0] * count
        self.position = [-1] * count
        self.tainted = [False] * count
        # By slot with drafts: its state after each row of the step.
        self._after: dict[int, list[tuple[int, int, bool]]] = {}

    def copy(self, sources: Iterable[int], targets: Iterable[int]) -> None:
        """All are read before any is written."""
        moves = [(self.value[one], self.position[one], self.tainted[one]) for one in sources]
        for target, (value, position, tainted) in zip(targets, moves, strict=True):
            self.value[target], self.position[target], self.tainted[target] = value, position, tainted

    def begin(self, slots: list[int], starts: list[int], lengths: list[int]) -> list[bool]:
        """Rows that start at 0 start anew; all others go on where their state is. Returns which are tainted."""
        assert not self._after, "it was not said which drafts of the last step are right"
        ends: dict[int, int] = {}
        for slot, start, length in zip(slots, starts, lengths, strict=True):
            if start == 0:
                self.value[slot], self.position[slot], self.tainted[slot] = 0, 0, False
            before = ends.get(slot, self.position[slot])
            assert before == start, f"slot {slot} goes on at {start} from a state of {before} tokens"
            ends[slot] = start + length
        return [self.tainted[slot] for slot in slots]

    def advance(self, slots: list[int], terms: list[int], lengths: list[int], tainted: list[bool]) -> list[int]:
        """Returns the states after the rows."""
        values = []
        for slot, term, length, spoiled in zip(slots, terms, lengths, tainted, strict=True):
            self.value[slot] = (self.value[slot] + term) & MASK
            self.position[slot] += length
            self.tainted[slot] = spoiled
            values.append(self.value[slot])
            self._after.setdefault(slot, []).append((self.value[slot], self.position[slot], spoiled))
        self._after = {slot: after for slot, after in self._after.items() if len(after) > 1}
        return values

    def settle(self, slot: int, count: int) -> None:
        """Of a slot's rows in the step, which speculates, count are right."""
        after = self._after.pop(slot, None)
        if after is not None:
            self.value[slot], self.position[slot], self.tainted[slot] = after[count - 1]


class SnapshotPages:
    """A PageMemory of the states from `first` on, of which page 0 is nobody's."""

    _ROW = np.dtype([("value", "u8"), ("position", "i8"), ("tainted", "?")])

    def __init__(self, states: States, first: int) -> None:
        self._states, self._first = states, first
        self.page_bytes = self._ROW.itemsize
        self.layout = "fake state"

    def copy_out(self, pages: Int32Array, into: npt.NDArray[np.uint8]) -> None:
        """See PageMemory."""
        states, places = self._states, (self._first + pages).tolist()
        rows = [(states.value[place], states.position[place], states.tainted[place]) for place in places]
        into[:] = np.array(rows, self._ROW).view(np.uint8).reshape(len(rows), -1)

    def copy_in(self, pages: Int32Array, data: npt.NDArray[np.uint8]) -> None:
        """See PageMemory."""
        states, rows = self._states, np.ascontiguousarray(data).view(self._ROW).reshape(-1)
        for place, row in zip((self._first + pages).tolist(), rows, strict=True):
            states.value[place], states.position[place] = int(row["value"]), int(row["position"])
            states.tainted[place] = bool(row["tainted"])

    def regions(self) -> list[tuple[int, int, int]]:
        """See PageMemory: lists have no address."""
        return []


def first_seen(position: int, window: int | None) -> int:
    """The first position that a query at this one sees."""
    if window is None:
        return 0
    if isinstance(window, Chunk):
        return position - position % int(window)
    return max(0, position - window + 1)


@functools.lru_cache(maxsize=64)
def _cells_of_pages(count: int, page_size: int) -> list[tuple[int, ...]]:
    """Nobody changes them: many devices of one size share them."""
    return [tuple(range(first, first + page_size)) for first in range(0, count, page_size)]


class Cells:
    """The KV cells of all pages. tags: position * groups + group that a cell was written for, -1 for never; tainted: by
    a failed step; layer0, layer1: hashes. Arrays, because others copy pages of them."""

    def __init__(self, num_pages: int, page_size: int, num_groups: int) -> None:
        count = (num_pages + 1) * page_size
        self.num_groups = num_groups
        self.tags: npt.NDArray[np.int64] = np.full(count, -1, np.int64)
        self.tainted = np.zeros(count, np.bool_)
        self.layer0: UInt64Array = np.zeros(count, np.uint64)
        self.layer1: UInt64Array = np.zeros(count, np.uint64)
        self._page_size = page_size
        self._of_page = _cells_of_pages(count, page_size)

    def parts(self) -> list[npt.NDArray[np.uint8]]:
        """uint8 [pages, bytes of a page] each."""
        arrays = self.tags, self.tainted, self.layer0, self.layer1
        size = self._page_size
        return [array.view(np.uint8).reshape(-1, size * array.itemsize) for array in arrays]

    def forget(self) -> None:
        self.tags.fill(-1)
        self.layer0.fill(0)
        self.layer1.fill(0)

    def of_pages(self, pages: list[int], begin: int, end: int) -> list[int]:
        """The cells at `begin` to `end` (exclusive) of what the pages hold one after the other."""
        return list(chain.from_iterable(map(self._of_page.__getitem__, pages)))[begin:end]


class Reads:
    """Every cell of a memory group that a row's first query or a later one sees, row after row, through its page table.

    cells: of all rows, `index` the same as an array; firsts: the first position of each row; bounds: where each row
    begins in them, and their end; written: where the step's tokens go. The rows' slots, starts and ends (exclusive).
    """

    def __init__(
        self,
        cells: Cells,
        group: int,
        window: int | None,
        table: Int32Array,
        page_size: int,
        slots: list[int],
        starts: list[int],
        ends: list[int],
    ) -> None:
        self._memory, self._group, self._window = cells, group, window
        self._starts, self._ends, self._slots, self._page_size = starts, ends, slots, page_size
        self.firsts = [first_seen(start, window) for start in starts]
        self.bounds = [0]
        self.cells: list[int] = []
        self.written: list[int] = []
        for slot, first, start, end in zip(slots, self.firsts, starts, ends, strict=True):
            low = first // page_size
            pages: list[int] = table[slot, low : -(-end // page_size)].tolist()
            assert 0 not in pages, f"slot {slot} reads the null page"
            own = cells.of_pages(pages, first - low * page_size, end - low * page_size)
            self.cells += own
            self.bounds.append(len(self.cells))
            self.written += own[start - first :]
        self.index = np.array(self.cells, np.int64)
        self.written_index = np.array(self.written, np.int64)

    def write(self, hashes: list[int], positions: Iterable[int]) -> None:
        """Layer 0 of the step's tokens."""
        memory = self._memory
        memory.tags[self.written_index] = [position * memory.num_groups + self._group for position in positions]
        memory.layer0[self.written_index] = np.array(hashes, np.uint64)

    def check(self) -> None:
        """Every cell was written for its position, and for the group."""
        memory = self._memory
        tags: list[int] = memory.tags[self.index].tolist()
        expected: list[int] = []
        for first, end in zip(self.firsts, self._ends, strict=True):
            expected += range(first * memory.num_groups + self._group, end * memory.num_groups, memory.num_groups)
        if tags != expected:
            at = next(at for at, (tag, must) in enumerate(zip(tags, expected, strict=True)) if tag != must)
            row = next(row for row, bound in enumerate(self.bounds) if bound > at) - 1
            position, group = divmod(tags[at], memory.num_groups) if tags[at] >= 0 else (-1, -1)
            raise AssertionError(
                f"slot {self._slots[row]} reads position {expected[at] // memory.num_groups} of group {self._group} in "
                f"page {self.cells[at] // self._page_size}, whose cell was written for position {position} of group "
                f"{group}"
            )

    def climb(self) -> list[int]:
        """Layer 1 of the step's tokens, which is written: a hash over layer 0 of what each of them sees."""
        values: list[int] = self._memory.layer0[self.index].tolist()
        above: list[int] = []
        for base, first, start, end in zip(self.bounds, self.firsts, self._starts, self._ends):  # noqa: B905
            place, low = base + start - first, base
            total = sum(values[base:place])
            for position in range(start, end):
                total += values[place]
                seen = base + first_seen(position, self._window) - first
                if seen > low:
                    total -= sum(values[low:seen])
                    low = seen
                above.append(mix_int(total & MASK))
                place += 1
        self._memory.layer1[self.written_index] = np.array(above, np.uint64)
        return above

    def totals(self) -> list[int]:
        """Of each row: layer 1 of all cells that its last token sees."""
        values: list[int] = self._memory.layer1[self.index].tolist()
        return [
            sum(values[base + first_seen(end - 1, self._window) - first : base + end - first]) & MASK
            for base, first, end in zip(self.bounds, self.firsts, self._ends)  # noqa: B905
        ]

    def tainted_rows(self) -> list[bool]:
        """Rows that read the leavings of a failed step."""
        tainted: list[bool] = self._memory.tainted[self.index].tolist()
        if True not in tainted:
            return [False] * len(self._slots)
        return [True in tainted[base:end] for base, end in zip(self.bounds, self.bounds[1:])]  # noqa: B905

    def taint(self, rows: Sequence[bool]) -> None:
        """The cells that rows write, as the rows are."""
        if len(set(rows)) == 1:
            self._memory.tainted[self.written_index] = rows[0]
            return
        lengths = [end - start for start, end in zip(self._starts, self._ends, strict=True)]
        self._memory.tainted[self.written_index] = np.repeat(np.array(rows, np.bool_), lengths)

"""The memory of the fake device: hashes in KV cells, read through page tables as a kernel would, and recurrent states.

Used by fake.py alone. Whatever is read is checked against what it was written for.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from engine.executor.tables import PagedMetadata
from engine.forward import Int32Array
from engine.groups import Chunk

UInt64Array = npt.NDArray[np.uint64]

MASK = 2**64 - 1
# Finalizer of splitmix64 (Steele, Lea, Flood 2014): every input bit flips every output bit half of the time.
MIX_1, MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
TOKEN, POSITION, ROUND = 0x9E3779B97F4A7C15, 0xD1B54A32D192ED03, 0x8CB92BA72F3D8DD7
STATE = 0xA0761D6478BD642F
U_MIX_1, U_MIX_2 = np.uint64(MIX_1), np.uint64(MIX_2)
U_TOKEN, U_POSITION, U_ROUND = np.uint64(TOKEN), np.uint64(POSITION), np.uint64(ROUND)
U_30, U_27, U_31, U_32, U_11, U_44 = (np.uint64(n) for n in (30, 27, 31, 32, 11, 44))


def mix_int(x: int) -> int:
    x = ((x ^ (x >> 30)) * MIX_1) & MASK
    x = ((x ^ (x >> 27)) * MIX_2) & MASK
    return x ^ (x >> 31)


def mix(x: UInt64Array) -> UInt64Array:
    x = (x ^ (x >> U_30)) * U_MIX_1
    x = (x ^ (x >> U_27)) * U_MIX_2
    return x ^ (x >> U_31)


def round_of(group: int) -> int:
    """So that equal tokens leave other cells in another group."""
    return (group + 1) * ROUND & MASK


def combine_ints(values: list[int]) -> int:
    """One number of one in each memory group."""
    result = values[0]
    for value in values[1:]:
        result = mix_int((result * ROUND + value) & MASK)
    return result


def combine(values: list[UInt64Array]) -> UInt64Array:
    result = values[0]
    for value in values[1:]:
        result = mix(result * U_ROUND + value)
    return result


class States:
    """Recurrent states with the number of tokens that each is of (-1: none), and whether a failed step is in it."""

    def __init__(self, count: int) -> None:
        self.value: UInt64Array = np.zeros(count, np.uint64)
        self.position: Int32Array = np.full(count, -1, np.int32)
        self.tainted = np.zeros(count, np.bool_)

    def copy(self, source: npt.NDArray[Any], target: npt.NDArray[Any]) -> None:
        for array in (self.value, self.position, self.tainted):
            array[target] = array[source]

    def begin(self, slots: Int32Array, starts: Int32Array) -> npt.NDArray[np.bool_]:
        """Rows that start at 0 start anew; all others go on where their state is. Returns which are tainted."""
        fresh = slots[starts == 0]
        self.value[fresh], self.position[fresh], self.tainted[fresh] = 0, 0, False
        wrong = self.position[slots] != starts
        assert not wrong.any(), (
            f"slots {slots[wrong].tolist()} go on at {starts[wrong].tolist()} from states of "
            f"{self.position[slots][wrong].tolist()} tokens"
        )
        result: npt.NDArray[np.bool_] = self.tainted[slots]
        return result

    def advance(
        self, slots: Int32Array, terms: UInt64Array, lengths: Int32Array, tainted: npt.NDArray[np.bool_]
    ) -> UInt64Array:
        """Returns the states after the rows."""
        self.value[slots] += terms
        self.position[slots] += lengths
        self.tainted[slots] = tainted
        return self.value[slots]


def _first_seen(positions: npt.NDArray[Any], window: int | None) -> npt.NDArray[Any]:
    """The first position that a query at each of these sees."""
    if window is None:
        return np.zeros_like(positions)
    chunked = isinstance(window, Chunk)
    first: npt.NDArray[Any] = positions - (positions % int(window) if chunked else window - 1)
    return first.clip(0)


class Reads:
    """Every cell of a memory group that a row's first query or a later one sees, row after row, through its page table.

    cells, rows, positions: [cells]; bases: where each row begins.
    """

    def __init__(
        self,
        metadata: PagedMetadata,
        table: Int32Array,
        page_size: int,
        slots: Int32Array,
        starts: Int32Array,
        window: int | None,
    ) -> None:
        kv_len = metadata.kv_len
        first = _first_seen(starts, window)
        self.window, self.slots = window, slots
        self.ends = np.cumsum(kv_len - first)
        self.bases = self.ends - (kv_len - first)
        self.rows = np.repeat(np.arange(len(slots)), kv_len - first)
        self.positions = np.arange(int(self.ends[-1])) - (self.bases - first)[self.rows]
        self.pages = table[slots[self.rows], self.positions // page_size]
        null = int(slots[self.rows[int(self.pages.argmin())]]) if not self.pages.all() else 0
        assert not null, f"slot {null} reads the null page"
        self.cells = self.pages * page_size + self.positions % page_size

    def check(self, group: int, cell_position: Int32Array, cell_group: Int32Array) -> None:
        """Every cell was written for its position, and for the group."""
        wrong = (cell_position[self.cells] != self.positions) | (cell_group[self.cells] != group)
        if wrong.any():
            at = int(wrong.argmax())
            cell = self.cells[at]
            raise AssertionError(
                f"slot {self.slots[self.rows[at]]} reads position {self.positions[at]} of group {group} in page "
                f"{self.pages[at]}, whose cell was written for position {cell_position[cell]} of group "
                f"{cell_group[cell]}"
            )

    def sums(self, layer: UInt64Array) -> UInt64Array:
        """[cells]: of each token's cell and all before it that it sees."""
        values = layer[self.cells]
        sums = np.cumsum(values)
        before = sums - values
        since = self.bases[self.rows]
        if self.window is not None:
            since = np.maximum(
                since, np.arange(len(values)) - self.positions + _first_seen(self.positions, self.window)
            )
        sums -= before[since]
        return sums

    def totals(self, layer: UInt64Array) -> UInt64Array:
        """[rows]: of all cells that the row's last token sees."""
        values, bases = layer[self.cells], self.bases
        if self.window is not None:
            last = self.positions[self.ends - 1]
            bases = np.maximum(bases, self.ends - 1 - last + _first_seen(last, self.window))
            values = np.where(np.arange(len(values)) >= bases[self.rows], values, np.uint64(0))
        result: UInt64Array = np.add.reduceat(values, bases)
        return result

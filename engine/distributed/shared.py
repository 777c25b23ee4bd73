"""Pages and states of ranks on the host's cores where somebody carries them elsewhere: a page is what all ranks have of
it, one behind the other, and rank 0 sees the memory of all of them.

The others take theirs from a file without a name, each from its own stretch of it. Nothing is said of a copy: whoever
makes one holds the pages, and a step whose end rank 0 knows has written them in all ranks.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.uint8]

# Of the file, what is one rank's: of it pages that nobody touched take no memory.
STRETCH = 1 << 42
# What is mapped at once, for many pools: Python keeps a file of its own for every mapping.
PIECE = 1 << 38


def make_file(size: int) -> int:
    """For so many ranks."""
    file = os.memfd_create("oneloop-pages")
    os.ftruncate(file, size * STRETCH)
    return file


class SharedMemory:
    """One rank's stretch of the file."""

    def __init__(self, file: int, rank: int) -> None:
        self._file, self._end = file, rank * STRETCH
        # Where each begins in the file.
        self._maps: list[tuple[int, mmap.mmap, Rows]] = []
        self._left = np.empty(0, np.uint8)  # of the last of them
        self._given: list[Rows] = []
        self._taken = 0

    def take(self, count: int) -> Rows:
        """So many zeroed bytes. After `release` as many are asked for in the same order, and are where they were.
        Raises OSError."""
        if self._taken == len(self._given):
            room = -(-count // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
            if room > len(self._left):
                mapped = mmap.mmap(self._file, max(room, PIECE), offset=self._end)
                self._left = np.frombuffer(mapped, np.uint8)
                self._maps.append((self._end, mapped, self._left))
                self._end += len(self._left)
            self._given.append(self._left[:room])
            self._left = self._left[room:]
        memory = self._given[self._taken]
        self._taken += 1
        assert count <= len(memory), "other memory than before"
        return memory[:count]

    def release(self) -> None:
        """Give the memory back: what is read there now are zeros."""
        for _, mapped, _ in self._maps:
            mapped.madvise(mmap.MADV_REMOVE)
        self._taken = 0

    def place_of(self, rows: Rows) -> list[int]:
        """Where rows [R, bytes] that came from here begin in the file, R, and the bytes of a row."""
        address = rows.ctypes.data
        for begin, _, memory in self._maps:
            first = memory.ctypes.data
            if first <= address < first + len(memory):
                return [begin + address - first, *rows.shape]
        raise AssertionError("this is no memory of the file")


def seen(file: int, places: Sequence[Sequence[int]]) -> list[Rows]:
    """The memory of one rank in another process, uint8 [R, bytes of a row] each. Raises OSError."""
    if not places:
        return []
    first = min(begin for begin, _, _ in places) // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    mapped = mmap.mmap(file, max(begin + count * width for begin, count, width in places) - first, offset=first)
    return [
        np.frombuffer(mapped, np.uint8, count * width, begin - first).reshape(count, width)
        for begin, count, width in places
    ]

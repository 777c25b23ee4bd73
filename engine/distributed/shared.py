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


def make_file(size: int) -> int:
    """For so many ranks."""
    file = os.memfd_create("oneloop-pages")
    os.ftruncate(file, size * STRETCH)
    return file


class SharedMemory:
    """One rank's stretch of the file."""

    def __init__(self, file: int, rank: int) -> None:
        self._file, self._begin = file, rank * STRETCH
        self._end = self._begin
        self._maps: list[tuple[int, mmap.mmap, Rows]] = []
        self._taken = 0

    def take(self, count: int) -> Rows:
        """So many zeroed bytes. After `release` as many are asked for in the same order, and are where they were."""
        if self._taken == len(self._maps):
            room = -(-count // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
            mapped = mmap.mmap(self._file, room, offset=self._end)
            self._maps.append((self._end, mapped, np.frombuffer(mapped, np.uint8)))
            self._end += room
        _, _, memory = self._maps[self._taken]
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


def seen(file: int, place: Sequence[int]) -> Rows:
    """The same memory in another process, uint8 [R, bytes of a row]."""
    begin, count, width = place
    ahead = begin % mmap.ALLOCATIONGRANULARITY
    mapped = mmap.mmap(file, ahead + count * width, offset=begin - ahead)
    return np.frombuffer(mapped, np.uint8, count * width, ahead).reshape(count, width)

"""A group of processes that compute one model together, each its part: what they add up, and where they meet.

One region of shared memory holds it all: words that are counted up and waited for (kernels_ranks.h), a slot of each
rank for sums, a section of each rank for parts of logits, and two places for messages. Used by one thread of each rank,
the executor's or one beside it (distributed/ring.py); `end` by any thread of any rank.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from engine.ops import native

WORD = 64  # bytes: a cache line
# Of one rank's part of a sum, at a time.
SLOT_BYTES = 1 << 20
# Nanoseconds that a wait spins with the GIL held, before it gives that up.
BRIEF = 20_000
NOT_YET = 1
# Bytes of a sum below which it is first tried with the GIL held.
HOLD_BELOW = 1 << 18


class RanksEndedError(Exception):
    """The group is over: a rank died, or was told to end."""


class _Group(ctypes.Structure):
    """RankGroup of kernels_ranks.h."""

    _fields_ = [
        ("words", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rank", "size", "slot_bytes", "done")),
        ("count", ctypes.c_uint32),
        ("given", ctypes.c_uint32),
    ]


@dataclass(frozen=True, slots=True)
class Layout:
    """What the region holds, in bytes. message: of one message, of which there are two places. logits: of the section
    in which a rank lays its part of logits, and its answers."""

    size: int
    message: int
    logits: int
    slot: int = SLOT_BYTES

    @property
    def words(self) -> int:
        """One that says that the group is over, one for each rank's arrivals, the number of the last message, and what
        each rank has spent."""
        return _whole(WORD * (2 * self.size + 2))

    @property
    def total(self) -> int:
        return self.words + 2 * self.size * _whole(self.slot) + self.size * _whole(self.logits) + 2 * self.message_room

    @property
    def message_room(self) -> int:
        return _whole(self.message)

    def logits_at(self, rank: int) -> int:
        return self.words + 2 * self.size * _whole(self.slot) + rank * _whole(self.logits)

    def message_at(self, number: int) -> int:
        return self.logits_at(self.size) + number % 2 * self.message_room


def _whole(count: int) -> int:
    """In whole pages."""
    return -(-count // mmap.PAGESIZE) * mmap.PAGESIZE


class Ranks:
    """One process's end of the group. file: of the region, of which pages that nobody touched take no memory."""

    def __init__(self, file: int, layout: Layout, rank: int) -> None:
        library = native.library()
        assert library is not None, "ranks need the compiled kernels"
        self._library = library
        self.layout = layout
        self.rank, self.size = rank, layout.size
        self._map = mmap.mmap(file, layout.total)
        self.memory: npt.NDArray[np.uint8] = np.frombuffer(self._map, np.uint8)
        base = self.memory.ctypes.data
        self._group = _Group(base, base + layout.words, rank, layout.size, _whole(layout.slot), 0, 0, 0)
        self._handle = ctypes.addressof(self._group)
        self._ended = base
        self._posted = base + WORD * (layout.size + 1)
        self.num_messages = 0

    def spent_ns(self) -> npt.NDArray[np.int64]:
        """[ranks, 2]: nanoseconds of every rank's collectives so far, until others had arrived, and to copy and add."""
        begin = WORD * (self.size + 2)
        lines = self.memory[begin : begin + WORD * self.size].view(np.int64).reshape(self.size, -1)
        return lines[:, :2].copy()

    @staticmethod
    def make_file(layout: Layout) -> int:
        """A region of memory without a name: it goes with the last process that has it."""
        file = os.memfd_create("oneloop-ranks")
        os.ftruncate(file, layout.total)
        return file

    def sum(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """What all ranks have in x [T, C], added up in their order, and bias (float32 [C]); in x's memory where that is
        in one piece. Every rank calls it with as many rows."""
        code = native.type_code(x.dtype)
        assert code is not None and x.shape[1] * x.element_size() <= self.layout.slot
        x = x.contiguous()
        rows, columns = x.shape
        given = (
            self._handle,
            code,
            x.data_ptr(),
            x.data_ptr(),
            rows,
            columns,
            None if bias is None else bias.data_ptr(),
        )
        if rows * columns * x.element_size() < HOLD_BELOW:
            how = self._library.hold.ol_ranks_sum(*given, BRIEF)
            if how == NOT_YET:
                how = self._library.release.ol_ranks_go_on(*given)
        else:
            how = self._library.release.ol_ranks_sum(*given, 0)
        self._check(how)
        return x

    def arrive(self) -> None:
        """This rank's part lies in its section."""
        self._library.hold.ol_ranks_arrive(self._handle)

    def meet(self) -> None:
        """Wait until all have arrived as often as this rank has."""
        how = self._library.hold.ol_ranks_meet(self._handle, BRIEF)
        if how == NOT_YET:
            how = self._library.release.ol_ranks_meet(self._handle, 0)
        self._check(how)

    def section(self, rank: int) -> npt.NDArray[np.uint8]:
        """Where that rank lays its part of logits."""
        at = self.layout.logits_at(rank)
        return self.memory[at : at + self.layout.logits]

    def next_message(self) -> npt.NDArray[np.uint8]:
        """Rank 0: where the next message goes. The one before the last, which lay there, has been read by all."""
        at = self.layout.message_at(self.num_messages + 1)
        return self.memory[at : at + self.layout.message]

    def post(self) -> None:
        """Rank 0: the message is complete."""
        self.num_messages += 1
        self._library.hold.ol_word_post(self._posted, self.num_messages & 0xFFFFFFFF)

    def receive(self) -> npt.NDArray[np.uint8]:
        """Other ranks: wait for the next message. It stays where it is until the one after the next is written."""
        target = (self.num_messages + 1) & 0xFFFFFFFF
        self._check(self._library.release.ol_word_wait(self._posted, target, self._ended))
        self.num_messages += 1
        at = self.layout.message_at(self.num_messages)
        return self.memory[at : at + self.layout.message]

    def end(self) -> None:
        """Nobody waits any more: everybody who does, or will, gets a RanksEndedError."""
        self._library.hold.ol_ranks_end(self._handle)

    def _check(self, how: Any) -> None:
        if how:
            raise RanksEndedError("the ranks have ended")

"""What rank 0 tells the others, and what all say to one another: bytes and JSON in the group's shared memory.

For whoever does not meet in sums on the host: the steps of ranks on GPUs, which meet on their devices, and threads
beside the steps, also those of ranks on the host's cores, whose steps need none (leader.py). So every message is
acknowledged, and the place of one is written again when all have read it. A message may be longer than its place, and
comes in pieces then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from engine.ops.ranks import Layout, Ranks

# Of a place for messages; a step of 256 decode rows takes 6 KB.
PLACE_BYTES = 1 << 20
# Of what a rank says to all: choices for every layer; and behind that its last word.
SECTION_BYTES = 4 << 20
LAST_BYTES = 4096
HEAD = 16

Bytes = npt.NDArray[np.uint8]


# Of the sections where pages lie between two devices, which take memory where they are touched; and where in these.
CARRIED_BYTES = 1 << 28
DATA_AT = 1 << 16
# Rings beside the steps', for threads of their own.
ADAPTERS, PAGES = 0, 1


def layouts_of(size: int) -> list[Layout]:
    """Of the shared memory of each ring, the steps' first: sums are the devices'."""
    sections = SECTION_BYTES, SECTION_BYTES, CARRIED_BYTES
    return [Layout(size, PLACE_BYTES, section, slot=4096) for section in sections]


def adapters_layout(size: int) -> Layout:
    """Of the ring beside steps that have no ring."""
    return layouts_of(size)[1 + ADAPTERS]


def open_rings(files: Sequence[int], rank: int, size: int) -> Ring:
    """A rank's end of all of them, of which it is told by the steps'."""
    first, *beside = (Ring(Ranks(f, layout, rank)) for f, layout in zip(files, layouts_of(size), strict=True))
    first.beside = tuple(beside)
    return first


class Ring:
    """One process's end. Used by one thread at a time, in every rank for the same things in the same order; `end` by
    any. All of it raises RanksEndedError once the group is over.

    beside: others, for other threads, which are over when this one is.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.beside: tuple[Ring, ...] = ()
        self.rank, self.size = ranks.rank, ranks.size
        # Messages for whose reading rank 0 has waited, or will wait next.
        self._settled = 0

    def send(self, parts: Sequence[Bytes]) -> None:
        """Rank 0: tell all others these bytes, laid one behind another."""
        room = self.ranks.layout.message - HEAD
        total = sum(map(len, parts))
        if total <= room:
            self._post(total, parts)
            return
        whole = np.concatenate(parts)
        for begin in range(0, total, room):
            self._post(total, [whole[begin : begin + room]])

    def _post(self, total: int, parts: Sequence[Bytes]) -> None:
        ranks, length = self.ranks, sum(map(len, parts))
        if ranks.num_messages - self._settled == 2:
            # The last but one lies where this one goes.
            self._settled += 1
            ranks.arrive()
            ranks.meet()
        place = ranks.next_message()
        place[:HEAD].view(np.int64)[:] = total, length
        np.concatenate(parts, out=place[HEAD : HEAD + length])
        ranks.post()

    def receive(self) -> Bytes:
        """The others: wait for the next message; a copy of it."""
        missing = 1
        pieces: list[Bytes] = []
        while missing > 0:
            place = self.ranks.receive()
            total, length = place[:HEAD].view(np.int64).tolist()
            missing = (total if not pieces else missing) - length
            pieces.append(place[HEAD : HEAD + length].copy())
            self.ranks.arrive()
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def exchange(self, value: Any) -> list[Any]:
        """What every rank says, by rank, as JSON has it."""
        ranks = self.ranks
        while self.rank == 0 and self._settled < ranks.num_messages:
            self._settled += 1
            ranks.arrive()
        text = orjson.dumps(value)
        section = ranks.section(self.rank)
        assert HEAD + len(text) <= len(section) - LAST_BYTES, "too much to say"
        section[:HEAD].view(np.int64)[0] = len(text)
        section[HEAD : HEAD + len(text)] = np.frombuffer(text, np.uint8)
        ranks.arrive()
        ranks.meet()
        said = [orjson.loads(self._said(rank)) for rank in range(self.size)]
        # Nobody writes anew what another still reads.
        ranks.arrive()
        ranks.meet()
        return said

    def _said(self, rank: int) -> bytes:
        section = self.ranks.section(rank)
        length = int(section[:HEAD].view(np.int64)[0])
        return section[HEAD : HEAD + length].tobytes()

    def end(self, why: str | None = None) -> None:
        """Nobody waits any more. why: a line that the others may want to know."""
        if why is not None:
            text = why.encode()[: LAST_BYTES - HEAD]
            last = self.ranks.section(self.rank)[-LAST_BYTES:]
            last[HEAD : HEAD + len(text)] = np.frombuffer(text, np.uint8)
            last[:HEAD].view(np.int64)[0] = len(text)
        self.ranks.end()
        for each in self.beside:
            each.end()

    def last_word(self) -> str | None:
        """Why some rank has ended it, where it said so."""
        for rank in range(self.size):
            last = self.ranks.section(rank)[-LAST_BYTES:]
            if length := int(last[:HEAD].view(np.int64)[0]):
                return last[HEAD : HEAD + length].tobytes().decode(errors="replace")
        return None

"""SlotTable: the host's numbers of every sequence that runs, one row per seq slot, advanced a whole batch at a time.

Rows that merely continue cost no Python: the scheduler asks these arrays for the few rows that finish or need a
page. Written by the Scheduler alone. Indices are intp, because numpy copies any other kind before it gathers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from engine.forward import NULL_SLOT, BoolArray, Int32Array, Limits
from engine.request import MAX_STOP_TOKEN_IDS

if TYPE_CHECKING:
    from engine.scheduling.sequence import Sequence

IndexArray = npt.NDArray[np.intp]


class SlotTable:
    """All [num_slots]; NO_STEP marks a slot that no step has touched.

    known: tokens whose value is known. computed: tokens whose KV is computed by a launched step.
    capacity: tokens that the sequence's pages hold. limit: max_length.
    bound: min(capacity, limit - 1): while computed < bound, a decode row needs no attention at all.
    last_step: the newest step that carries the slot; it is in flight while that step is not committed.
    token_at: when the slot's newest token was committed, NaN before the first.
    constrained: the slot samples under a grammar; num_constrained slots do.
    max_drafts: most drafts of a row, 0 where the slot does not speculate. drafted_in: the newest step that carries a
    speculating row of the slot; while that is in flight, `computed` is the most that it may come to.
    draft_counts: [3, num_slots]; of the slot's sequence since it has the slot, see Sequence.draft_counts.
    live: committed tokens of this slot are wanted. stop_ids: [MAX_STOP_TOKEN_IDS, num_slots], padded with -1.
    tokens: [num_slots, max_model_len + 1]; reserved lazily by the operating system, so unused length costs nothing.
    """

    NO_STEP = -1

    def __init__(self, limits: Limits) -> None:
        slots = limits.num_slots
        self.page_size = limits.page_size
        self.sequences: list[Sequence | None] = [None] * slots
        self.known: Int32Array = np.zeros(slots, np.int32)
        self.computed: Int32Array = np.zeros(slots, np.int32)
        self.capacity: Int32Array = np.zeros(slots, np.int32)
        self.limit: Int32Array = np.zeros(slots, np.int32)
        self.bound: Int32Array = np.zeros(slots, np.int32)
        self.last_step: npt.NDArray[np.int64] = np.full(slots, self.NO_STEP, np.int64)
        self.token_at: npt.NDArray[np.float64] = np.full(slots, np.nan)
        self.constrained: BoolArray = np.zeros(slots, np.bool_)
        self.num_constrained = 0
        self.max_drafts: Int32Array = np.zeros(slots, np.int32)
        self.drafted_in: npt.NDArray[np.int64] = np.full(slots, self.NO_STEP, np.int64)
        self.draft_counts: Int32Array = np.zeros((3, slots), np.int32)
        self._most_drafts = limits.max_draft_tokens
        self.live: BoolArray = np.zeros(slots, np.bool_)
        self.stop_ids: Int32Array = np.full((MAX_STOP_TOKEN_IDS, slots), -1, np.int32)
        # Stop ids per row that any row has ever had: rows of stop_ids beyond it hold nothing.
        self.max_stop_ids = 0
        self.tokens: Int32Array = np.empty((slots, limits.max_model_len + 1), np.int32)
        self.flat_tokens: Int32Array = self.tokens.reshape(-1)
        self.token_width = limits.max_model_len + 1
        self._free = list(range(slots - 1, NULL_SLOT, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def pop_free(self) -> int:
        return self._free.pop()

    def occupy(self, slot: int, sequence: Sequence, tokens: Int32Array) -> None:
        """Give a free slot to a sequence whose tokens are known up to here."""
        assert self.sequences[slot] is None, f"slot {slot} is taken"
        self.sequences[slot] = sequence
        self.known[slot] = len(tokens)
        self.tokens[slot, : len(tokens)] = tokens
        self.computed[slot] = 0
        self.limit[slot] = sequence.max_length
        self.last_step[slot] = self.drafted_in[slot] = self.NO_STEP
        self.draft_counts[:, slot] = 0
        # One that is tried goes token by token, so that it is known where it passes.
        self.max_drafts[slot] = 0 if sequence.suspect_until else sequence.request.most_drafts(self._most_drafts)
        self.live[slot] = True
        self.token_at[slot] = np.nan
        self.constrained[slot] = constrained = sequence.request.constraint is not None
        self.num_constrained += constrained
        stop_ids = sequence.stop_ids
        self.stop_ids[: len(stop_ids), slot] = stop_ids
        self.max_stop_ids = max(self.max_stop_ids, len(stop_ids))
        self.set_capacity(slot, 0)

    def set_capacity(self, slot: int, num_pages: int) -> None:
        capacity = num_pages * self.page_size
        self.capacity[slot] = capacity
        self.bound[slot] = min(capacity, int(self.limit[slot]) - 1)

    def vacate(self, slot: int) -> None:
        """Take a slot back; nothing of it may be in flight (the caller has checked)."""
        assert self.sequences[slot] is not None, f"slot {slot} is free"
        self.sequences[slot] = None
        self.num_constrained -= int(self.constrained[slot])
        self.constrained[slot] = self.live[slot] = False
        self.stop_ids[:, slot] = -1
        self._free.append(slot)


class Scratch:
    """Buffers of max_num_seqs rows for the vectorised passes: a steady step allocates no array."""

    def __init__(self, rows: int) -> None:
        self._buffers: dict[Any, npt.NDArray[Any]] = {}
        self._rows = rows

    def get(self, name: str, dtype: Any, length: int) -> npt.NDArray[Any]:
        buffer = self._buffers.get(name)
        if buffer is None:
            buffer = self._buffers[name] = np.zeros(self._rows, dtype)
        return buffer[:length]

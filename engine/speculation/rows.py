"""Speculation: which rows of a step bring drafts, and which of their tokens count once it has ended.

A draft is a longer decode row, and the executor owns the drafts: here it is only said how many a row may have. A step
is built before anybody on the host knows how many of the last one's drafts were right, so `SlotTable.computed` counts
all of them, and the commit takes back those that were not. Owned by the Scheduler; no Python per row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from engine.forward import BoolArray, ForwardOutput, Int32Array, Limits

if TYPE_CHECKING:
    from engine.scheduling.batch import Batch
    from engine.scheduling.slots import IndexArray, SlotTable


class Budgets(Protocol):
    """How many drafts pay. Whatever it answers, the tokens are the same."""

    def begin(self, slot: int) -> None:
        """Another sequence has the slot now."""
        ...

    def plan(self, slots: IndexArray) -> Int32Array:
        """int32 [n]: most drafts for each of the rows that decode next; written to by the caller."""
        ...

    def observe(self, slots: IndexArray, num_drafted: Int32Array, num_accepted: Int32Array) -> None:
        """What became of the drafts of a step's rows."""
        ...

    def took(self, num_tokens: int, seconds: float) -> None:
        """What a step with decode and speculating rows alone took."""
        ...


class Speculation:
    """See the module. Totals since the start: num_drafts (rows whose drafts were checked), num_draft_tokens,
    num_accepted_tokens, and accepted_by_position int64 [max_draft_tokens]."""

    def __init__(self, limits: Limits, table: SlotTable, budgets: Budgets | None) -> None:
        self.num_drafts = self.num_draft_tokens = self.num_accepted_tokens = 0
        self.accepted_by_position: npt.NDArray[np.int64] = np.zeros(limits.max_draft_tokens, np.int64)
        self._budgets = budgets
        self._table = table
        # What the executor holds for a slot's next row, as far as the host was told.
        self._drafts: Int32Array = np.full((limits.num_slots, limits.max_draft_tokens), -1, np.int32)
        self._scheduled_at = [0.0, 0.0]
        self._ended_at = 0.0
        self._columns: Int32Array = np.arange(1 + limits.max_draft_tokens, dtype=np.int32)

    def begin(self, slot: int) -> None:
        """Another sequence has the slot now."""
        self.forget(slot)
        if self._budgets is not None:
            self._budgets.begin(slot)

    def forget(self, slot: int) -> None:
        """The drafts that the host was told of are not the next row's."""
        self._drafts[slot] = -1

    def told(self, slot: int, drafts: Int32Array) -> None:
        """What the executor holds for its next row."""
        self._drafts[slot] = -1
        self._drafts[slot, : len(drafts)] = drafts

    def drafts_of(self, slot: int, most: int) -> list[int]:
        """The first of those that the next row brings."""
        drafts: list[int] = self._drafts[slot, :most].tolist()
        return drafts[: drafts.index(-1)] if -1 in drafts else drafts

    def split(self, slots: IndexArray, room: int, committed: int) -> tuple[IndexArray, IndexArray, Int32Array]:
        """Rows that decode, and those that speculate with the drafts that each may have.

        room: tokens that drafts may add to the step; the first rows get theirs first. committed: the last such step. A
        row whose length is not known goes on speculating, if need be without drafts; and so does one under a grammar,
        for the host must know what it brings.
        """
        table = self._table
        most = table.max_drafts[slots]
        counts = most.copy() if self._budgets is None else np.minimum(self._budgets.plan(slots), most)
        np.minimum(counts, table.limit[slots] - table.computed[slots] - 2, out=counts)
        np.maximum(counts, 0, out=counts)
        ahead = np.cumsum(counts) - counts
        counts = np.minimum(counts, np.maximum(room - ahead, 0)).astype(np.int32)
        drafts: BoolArray = (counts > 0) | (table.drafted_in[slots] > committed)
        if table.num_constrained:
            drafts |= table.constrained[slots] & (most > 0)
        if not drafts.any():
            return slots, slots[:0], counts[:0]
        return slots[~drafts], slots[drafts], counts[drafts]

    def accept(self, batch: Batch, output: ForwardOutput, tokens: Int32Array) -> tuple[Int32Array, list[int]]:
        """Append what speculating rows brought up to its end, but for the last token, which goes to `tokens` in place.

        Returns int32 [rows], new tokens of each row; and rows that were cut where their grammar ends.
        """
        table, forward, accepted = self._table, batch.forward_input, output.accepted
        first, num_rows = forward.num_decode_rows, forward.num_speculating_rows
        assert accepted is not None and len(accepted.counts) == num_rows, "the executor did not say what was accepted"
        rows = slice(first, first + num_rows)
        wanted = np.flatnonzero(table.live[batch.slots[rows]] & batch.samples[rows])
        slots, lengths = batch.slots[rows][wanted], batch.staging.row_len[rows][wanted]
        counts, new, drafted = accepted.counts[wanted], accepted.tokens[wanted], accepted.num_drafted[wanted]
        assert bool(((counts >= 1) & (counts <= drafted + 1) & (drafted < lengths)).all()), "more tokens than drafts"
        table.computed[slots] -= lengths - counts
        columns = self._columns[: new.shape[1]]
        known = table.known[slots]
        kept = counts  # drafts never go beyond the length, see `split`
        ends = np.zeros(new.shape, np.bool_)
        for stop_ids in table.stop_ids[: table.max_stop_ids]:
            ends |= new == stop_ids[slots][:, None]
        ends &= columns < kept[:, None]
        kept = np.where(ends.any(axis=1), ends.argmax(axis=1) + 1, kept).astype(np.int32)
        cut = []
        for row, end in batch.ends.items():
            place = int(np.searchsorted(wanted, row - first))
            if place < len(wanted) and wanted[place] == row - first and counts[place] > end:
                kept[place] = min(int(kept[place]), end)
                cut.append(row)
        where, column = np.nonzero(columns < (kept - 1)[:, None])
        table.tokens[slots[where], known[where] + column] = new[where, column]
        table.known[slots] = known + kept - 1
        tokens[first + wanted] = new[np.arange(len(wanted)), kept - 1]
        self._drafts[slots, : accepted.drafts.shape[1]] = accepted.drafts[wanted]
        self._count(slots, drafted, counts - 1, np.minimum(counts - 1, kept))
        result = np.ones(batch.num_rows, np.int32)
        result[first + wanted] = kept
        return result, cut

    def _count(self, slots: IndexArray, drafted: Int32Array, right: Int32Array, used: Int32Array) -> None:
        if self._budgets is not None:
            self._budgets.observe(slots, drafted, right)
        checked = drafted > 0
        self.num_drafts += int(np.count_nonzero(checked))
        self.num_draft_tokens += int(drafted.sum())
        self.num_accepted_tokens += int(right.sum())
        if len(self.accepted_by_position):
            self.accepted_by_position += (right[:, None] > self._columns[:-1]).sum(axis=0)
        self._table.draft_counts[0, slots] += drafted
        self._table.draft_counts[1, slots] += used
        self._table.draft_counts[2, slots] += checked

    def scheduled(self, batch: Batch, now: float) -> None:
        self._scheduled_at[batch.forward_input.step & 1] = now

    def ended(self, batch: Batch, output: ForwardOutput, now: float) -> None:
        """What a step took, if no prompt had a part in it; and what the executor holds after its chunks."""
        forward, accepted = batch.forward_input, output.accepted
        if self._budgets is not None and forward.num_decode_rows + forward.num_speculating_rows == forward.num_rows:
            drafted = 0 if accepted is None else int(accepted.num_drafted.sum())
            since = max(self._ended_at, self._scheduled_at[forward.step & 1])
            self._budgets.took(forward.num_rows + drafted, now - since)
        self._ended_at = now
        for row, drafts in output.new_drafts:
            slot = int(batch.slots[row])
            if self._table.live[slot]:
                self.told(slot, drafts)

"""Failing: what becomes of a step that failed, of rows without numbers, and of whoever shares what they computed.

The Scheduler is one. Nobody is blamed who might be innocent: of several sequences in a failed step each is a suspect,
and runs again (see Trials).
"""

from __future__ import annotations

import numpy as np

from engine.forward import ForwardError, Int32Array
from engine.request import FinishReason
from engine.scheduling.batch import Batch, StepResult
from engine.scheduling.residents import Residents
from engine.scheduling.sequence import Sequence, SequenceStatus


class Failing(Residents):
    """See the module."""

    def fail(self, batch: Batch, error: ForwardError) -> StepResult:
        """A step failed: whoever made it fail ends with an error, once that is known; all others are computed again.

        What the step entered into the radix tree is taken back, and who shares it already starts over. Each of its
        sequences is a suspect; the culprit is who keeps failing alone (see Trials).
        """
        self._end_step(batch)
        table, cache, slots = self._table, self.kv_cache, batch.slots
        result = StepResult(slots[:0], np.zeros(0, np.int32), np.zeros(0))
        for sequence, first_page, _ in batch.entered:
            if sequence.pages is not None:
                cache.take_back(sequence.pages, first_page)
        # What was computed before the step is good, also of one that was aborted. Windows have left some of it behind.
        starts = self._starts(batch)
        table.computed[slots] = np.minimum(table.computed[slots], 0 if cache.has_windows else starts)
        members = [self.sequence_of(slot) for slot in slots.tolist()]
        suspects = [sequence for sequence in members if sequence.suspect_until]
        if all(table.live[one.slot] or one.is_finished for one in suspects):
            # Of drafts only the token before them is sure to come again; who is tried brings none.
            drafting = [batch.is_speculating(row) for row in range(batch.num_rows)]
            ends = starts + np.where(drafting, 1, batch.staging.row_len[: batch.num_rows])
            for sequence, end in zip(members, ends.tolist(), strict=True):
                sequence.suspect_until = max(sequence.suspect_until, end)
            # Also those that were cleared a step ago: they may have got to where they break.
            result.finished += self._trials.judge(members)
        # Else it was launched before the step that they are suspected for had failed, and tells nothing new.
        for sequence in result.finished:
            self.finish(sequence, FinishReason.ERROR, None)
        table.live[slots] = False
        self._distrust_heirs()
        self.retract_all()
        self._release_leaving()
        self._tell_who_waits()
        return result

    def _acquit(self, batch: Batch) -> None:
        """Suspects that the step has brought past the place where one had failed with them."""
        rows, staging = batch.num_rows, batch.staging
        ends = (staging.row_start[:rows] + staging.row_len[:rows]).tolist()
        live = [bool(self._table.live[slot]) for slot in batch.slots.tolist()]
        members = map(self.sequence_of, batch.slots.tolist())
        self._trials.succeeded((one, end) for one, end, wanted in zip(members, ends, live, strict=True) if wanted)

    def _make_cleared_wait(self) -> None:
        """While others are tried nobody else runs: who was cleared may break further on, and they would be blamed."""
        for sequence in [one for one in self._running if not one.suspect_until]:
            self._retract(sequence)

    def _starts(self, batch: Batch) -> Int32Array:
        """int32 [rows]: tokens that were computed before the oldest step in flight. Of a row that speculates its own
        number is the most that it might have been."""
        starts: Int32Array = np.minimum(batch.staging.row_start[: batch.num_rows], self._table.known[batch.slots] - 1)
        for row, num_computed in batch.dropped.items():
            # A prompt's last chunk starts before that.
            starts[row] = min(starts[row], num_computed)
        return starts

    def _end_broken(self, batch: Batch, rows: list[int]) -> list[Sequence]:
        """Rows that computed no numbers end with an error, and what they put into the radix tree leaves it.

        Who shares that is computed again. Returns those that ended now.
        """
        ended = []
        for slot in batch.slots[rows].tolist():
            if self._table.live[slot]:
                sequence = self.sequence_of(slot)
                # What it found there when it came is not its own.
                self.kv_cache.take_back(sequence.held_pages, sequence.num_cached_tokens // self.limits.page_size)
                self.finish(sequence, FinishReason.ERROR, None)
                ended.append(sequence)
        for sequence in self._distrust_heirs():
            self._retract(sequence)
        return ended

    def _distrust_heirs(self) -> list[Sequence]:
        """Who shares a page that was taken back: its tokens in flight come from there. Returns those that still run."""
        heirs = [
            sequence
            for sequence in (*self._running, *self._leaving)
            if sequence.pages is not None and not self.kv_cache.is_intact(sequence.pages)
        ]
        for sequence in heirs:
            self._table.live[sequence.slot] = False
        return [sequence for sequence in heirs if sequence.status is SequenceStatus.RUNNING]

    def _end_step(self, batch: Batch) -> None:
        assert batch.in_flight and batch.forward_input.step == self._committed_step + 1, "steps out of order"
        batch.in_flight = False
        self._committed_step += 1

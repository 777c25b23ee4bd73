"""Steps with drafts: on the device every draft is a decode row of its own, of the same slot, one token further on.

So they run by the kernels and graphs of decoding, at lengths that the host knows; only the tokens of such rows are
given, and the last right one of each sequence is found on the device. The host proposes, or says what a model on the
device is to read (cuda_drafter.py), and needs the tokens so far: a step that is to bring drafts is launched when the
one before it has ended. Where a text has given nothing to propose for some steps its rows go without, and no step
waits. Loop thread.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from engine.executor.cuda_buffers import CudaHandle, Drafted, Side
from engine.executor.cuda_drafter import DeviceDrafter, Drafts
from engine.executor.cuda_state import DeviceState
from engine.executor.speculator import Speculator, sampled_positions
from engine.forward import (
    FUTURE_TOKEN,
    ForwardInput,
    ForwardOutput,
    Int32Array,
    StepLogprobs,
)
from engine.speculation.base import Proposer

# A slot without proposals is waited for in so many steps more: a wait costs the host's part of a step, and behind a
# wrong draft the text often goes on as it was expected to.
PATIENCE = 3
# Steps in which a row that is not waited for is looked at once: the loop has little time where rows are many.
EVERY = 4
# A slot's next row begins where only the end of the step in flight will tell.
_UNKNOWN = -1


class DraftSteps(DeviceState):
    """See the module."""

    _speculator: Speculator | None = None

    def _draft_by(self, proposer: Proposer | None) -> None:
        limits = self.limits
        self._speculator = Speculator(limits, proposer, self._drafter, self._tables)
        # Tokens of a slot that are computed when all that was launched has ended.
        self._ahead: Int32Array = np.zeros(limits.num_slots, np.int32)
        # Steps for which a slot's rows still wait for proposals.
        self._patience: Int32Array = np.zeros(limits.num_slots, np.int32)
        # Rows begin with what the device has drawn.
        self._drawn: Int32Array = np.full(limits.num_slots, FUTURE_TOKEN, np.int32)

    def _draft_with(self, drafts: Drafts) -> None:
        """Have what drafts on the device. Blocks."""
        layer, tables, sampling = self.layer, self._page_tables, self._sampling
        with layer.may_block():
            self._drafter = drafter = DeviceDrafter(
                drafts,
                self.limits,
                layer,
                tables=tables,
                sampling=sampling,
                filters=self._filters,
                mode=self.graphs.mode,
                ranks=self._group,
            )
            drafter.reads_all = not self.limits.max_draft_tokens
            self.pieces.keep_aux(len(drafter.aux_layers))
            layer.synchronize_all()
            with layer.on(self._compute):
                drafter.settle(drafts.by_torch)
            layer.synchronize_all()
        self._ask_for_aux(self.model)

    def draft_once(self) -> None:
        """Drafts for nobody, so that a client waits for no kernel. Blocks."""
        assert self._drafter is not None
        with self.layer.may_block():
            with self.layer.on(self._compute):
                self._drafter.warm_up()
            self.layer.synchronize_all()

    # ---- before a step

    def _needs_tokens(self, given: ForwardInput) -> bool:
        """Whether a step is to wait for the end of the one in flight: where its rows begin, or what they bring."""
        if self._in_flight < 2 or not given.num_speculating_rows:
            return False
        rows = slice(given.num_decode_rows, given.num_decode_rows + given.num_speculating_rows)
        slots, lengths = given.staging.row_slot[rows], given.staging.row_len[rows]
        if (self._ahead[slots] == _UNKNOWN).any():
            return True
        return self._has_room(given) and bool(((self._patience[slots] > 0) & (lengths > 1)).any())

    def _has_room(self, given: ForwardInput) -> bool:
        """Whether some row could bring a draft."""
        return self._most_rows > given.num_rows

    def _with_drafts(self, given: ForwardInput, handle: CudaHandle) -> ForwardInput:
        """The step as the device runs it, in the side that `handle` then has; `given` where nothing speculates."""
        speculator, drafter = self._speculator, self._drafter
        if speculator is None:
            return given
        handle.given = given
        if drafter is not None:
            drafter.begin(given, [each.slot for each in given.speculations])
        if not given.num_speculating_rows:
            self._note_lengths(given)
            handle.reading = None if drafter is None else drafter.lay_out(given, given)
            return given
        # With a step in flight the tokens are not known, and its rows bring none.
        room = self._most_rows - given.num_rows if self._in_flight < 2 else 0
        step = speculator.as_it_runs(given, self._drawn, starts=self._ahead, room=room)
        self._note_lengths(step)
        if drafter is not None and (reading := drafter.lay_out(step, given)) is not None:
            handle.reading = reading
            speculator.drop(reading.made)
        handle.side = self._sides[2 + handle.side.parity]
        flat, handle.drafted = self._flatten(step, given, handle.side)
        handle.num_rows, handle.positions = flat.num_rows, handle.drafted.positions
        return flat

    def _note_lengths(self, step: ForwardInput) -> None:
        staging, first = step.staging, step.num_decode_rows
        slots, lengths = staging.row_slot[: step.num_rows], staging.row_len[: step.num_rows]
        ends = staging.row_start[: step.num_rows] + lengths
        drafting = slice(first, first + step.num_speculating_rows)
        ends[drafting][lengths[drafting] > 1] = _UNKNOWN
        self._ahead[slots] = ends

    @staticmethod
    def _flatten(step: ForwardInput, given: ForwardInput, side: Side) -> tuple[ForwardInput, Drafted]:
        """A step as it runs, written to a side's staging: a row for each draft. given: what it was made from."""
        own, flat, rows = step.staging, side.staging, step.num_rows
        first, last = step.num_decode_rows, step.num_decode_rows + step.num_speculating_rows
        counts = np.ones(rows, np.int64)
        counts[first:last] = own.row_len[first:last]
        row = np.repeat(np.arange(rows), counts)
        nth = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        num_rows, shift = len(row), len(row) - rows
        flat.row_slot[:num_rows] = own.row_slot[row]
        flat.row_start[:num_rows] = own.row_start[row] + nth
        flat.row_len[:num_rows] = own.row_len[row]
        flat.row_len[: last + shift] = 1
        flat.row_samples[:num_rows] = own.row_samples[row]
        flat.token_ids[: step.num_tokens] = own.token_ids[: step.num_tokens]
        flat.qo_indptr[0] = 0
        np.cumsum(flat.row_len[:num_rows], out=flat.qo_indptr[1 : num_rows + 1])
        changes, count = given.staging, step.num_table_diffs
        flat.reserve_table_diff(count)
        flat.table_index[:count], flat.table_page[:count] = changes.table_index[:count], changes.table_page[:count]
        count = step.num_sampling_diffs
        flat.sampling_slot[:count], flat.sampling[:count] = changes.sampling_slot[:count], changes.sampling[:count]
        flat.adapter[:count] = changes.adapter[:count]
        for name, count in (("save", step.num_saves), ("load", step.num_loads)):
            for each in (f"{name}_slot", f"{name}_snapshot"):
                getattr(flat, each)[:count] = getattr(changes, each)[:count]
        flattened = dataclasses.replace(
            step,
            staging=flat,
            num_rows=num_rows,
            num_decode_rows=last + shift,
            num_speculating_rows=0,
            pooled=[dataclasses.replace(each, row=each.row + shift) for each in step.pooled],
        )
        sampled = np.flatnonzero(flat.row_samples[:num_rows])
        return flattened, Drafted(step, sampled_positions(step), sampled, row, shift)

    @staticmethod
    def _drafts_seen(handle: CudaHandle) -> list[tuple[int, Int32Array]]:
        """(row, drafts) of a step's rows under a grammar that a model has drafted for, which are on the host now."""
        drafted, given, early = handle.drafted, handle.given, handle.early
        assert drafted is not None and given is not None and given.masks is not None and early is not None
        of_rows: dict[int, list[int]] = {}
        for (row, _, _), token in zip(handle.reading.spots, early.tolist(), strict=True):
            of_rows.setdefault(int(drafted.rows[row]), []).append(token)
        constrained = set(given.masks.rows.tolist())
        return [(row, np.array(drafts, np.int32)) for row, drafts in of_rows.items() if row in constrained]

    # ---- after it

    def _follow(self, handle: CudaHandle, output: ForwardOutput) -> None:
        """Of a step that has ended, in order: what its rows brought, and drafts for their next."""
        speculator, given, drafted = self._speculator, handle.given, handle.drafted
        if speculator is None or given is None:
            return
        self._learn(speculator, given)
        slots = given.staging.row_slot[: given.num_rows]
        wanted = self._wanted(given, slots)
        if drafted is None:
            positions = sampled_positions(given)
            speculator.finish(given, positions, output.token_ids[positions.rows], None, output, wanted=wanted)
        else:
            step, positions = drafted.step, drafted.positions
            for row, token in handle.told.items():
                step.staging.token_ids[row] = token
            drawn = output.token_ids[drafted.sampled]
            taken = speculator.count(step, positions, drawn)
            assert taken is not None
            output.token_ids = np.full(given.num_rows, FUTURE_TOKEN, np.int32)
            # In order, so that the last of a row stays.
            for row, token in zip(positions.rows[taken].tolist(), drawn[taken].tolist(), strict=True):
                output.token_ids[row] = token
            if (logprobs := output.logprobs) is not None:
                output.logprobs = _of_taken(logprobs, drafted, taken)
            if output.broken:
                counts = np.ones(len(drafted.rows), np.bool_)
                counts[drafted.sampled] = taken
                output.broken = sorted({int(drafted.rows[row]) for row in output.broken if counts[row]})
            for prompt in output.prompt_logprobs:
                prompt.row -= drafted.shift
            speculator.finish(step, positions, drawn, taken, output, wanted=wanted)
            self._settle_lengths(speculator, slots)
        found = np.array([speculator.num_drafts(slot) > 0 for slot in slots.tolist()], np.bool_)
        if self._drafter is not None:
            found |= self._drafter.has_drafts(slots)
        sampled = given.staging.row_samples[: given.num_rows]
        patience = np.where(found, PATIENCE, np.maximum(self._patience[slots] - sampled, 0))
        # Nothing was looked for: if such a row may have drafts all the same, that is tried.
        patience[: given.num_decode_rows] = 1
        self._patience[slots] = patience

    def _wanted(self, given: ForwardInput, slots: Int32Array) -> set[int]:
        """Whom to draft for: not for rows that have no room, nor always for those that are not waited for."""
        wanted = np.zeros(len(slots), np.bool_)
        if self._has_room(given):
            wanted[:] = (self._patience[slots] > 0) | ((slots + given.step) % EVERY == 0)
            wanted[: given.num_decode_rows] = False
        if given.masks is not None:
            # The host is told of the drafts, for which it makes masks.
            wanted[given.masks.rows] = True
        return set(slots[wanted].tolist())

    def _forget_drafts(self, handle: CudaHandle) -> None:
        """Of a step that has failed: its sequences are computed again."""
        if self._speculator is not None and handle.given is not None:
            given = handle.given
            self._learn(self._speculator, given)
            slots = given.staging.row_slot[: given.num_rows]
            self._settle_lengths(self._speculator, slots)
            if self._drafter is not None:
                self._drafter.lose(slots)

    def _settle_lengths(self, speculator: Speculator, slots: Int32Array) -> None:
        """Of rows whose drafts were in flight."""
        slots = slots[self._ahead[slots] == _UNKNOWN]
        self._ahead[slots] = speculator.length(slots)

    def _learn(self, speculator: Speculator, given: ForwardInput) -> None:
        """Whose slots speculate."""
        speculator.apply(given)
        self._patience[given.staging.sampling_slot[: given.num_sampling_diffs]] = 0
        self._patience[[each.slot for each in given.speculations]] = 1


def _of_taken(logprobs: StepLogprobs, drafted: Drafted, taken: npt.NDArray[np.bool_]) -> StepLogprobs:
    """Of the positions that became tokens alone, by the rows of the step."""
    place = np.searchsorted(drafted.sampled, logprobs.rows)
    kept = taken[place]
    return StepLogprobs(
        drafted.positions.rows[place][kept].astype(np.int32),
        logprobs.token_logprobs[kept],
        logprobs.ranks[kept],
        logprobs.top_ids[kept],
        logprobs.top_logprobs[kept],
    )

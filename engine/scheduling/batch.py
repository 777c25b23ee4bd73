"""Batch: the rows of one step, written straight into a Staging set. Filled by the Scheduler, read back at commit.

There are two, like the staging sets. The batch keeps its own copy of what commit needs, because the staging
set belongs to the executor once the step is submitted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from engine.forward import (
    FUTURE_TOKEN,
    BoolArray,
    ForwardInput,
    Int32Array,
    Limits,
    PooledRow,
    RowExtras,
    RowSpeculation,
    Staging,
    TokenMasks,
)
from engine.recorder import Chunk, Launch
from engine.request import SamplingParams
from engine.scheduling.sequence import Sequence
from engine.scheduling.slots import IndexArray


class Batch:
    """slots intp [rows], samples bool [rows]: decode rows first, then those that speculate. entered: (sequence, first
    page, end) put into the radix tree by this step, to be taken back if it fails. in_flight: between launch and
    commit. recorded, chunks: of its launch, where somebody looked (Recorder)."""

    def __init__(self, staging: Staging) -> None:
        limits: Limits = staging.limits
        self.staging = staging
        self.forward_input = ForwardInput(0, staging, 0, 0, 0, 0, 0)
        self._slots: IndexArray = np.zeros(limits.max_num_seqs, np.intp)
        self._samples: BoolArray = np.zeros(limits.max_num_seqs, np.bool_)
        self.entered: list[tuple[Sequence, int, int]] = []
        # Rows that sample under a grammar.
        self.constrained: list[tuple[int, Sequence]] = []
        # Of speculating rows under a grammar: tokens after which it ends, if they come.
        self.ends: dict[int, int] = {}
        # Of rows whose sample was dropped: tokens that are computed without the step.
        self.dropped: dict[int, int] = {}
        # Whose vectors the step brings, in the order of ForwardOutput.pooled.
        self.pooled: list[Sequence] = []
        self.all_sample = True
        self.in_flight = False
        self.recorded: Launch | None = None
        self.chunks: list[Chunk] | tuple[()] = ()
        self._width, self._num_slots = limits.max_pages_per_seq, limits.num_slots
        self._arange: Int32Array = np.arange(limits.max_num_seqs + 1, dtype=np.int32)

    @property
    def num_rows(self) -> int:
        return self.forward_input.num_rows

    @property
    def num_tokens(self) -> int:
        return self.forward_input.num_tokens

    @property
    def slots(self) -> IndexArray:
        return self._slots[: self.forward_input.num_rows]

    @property
    def samples(self) -> BoolArray:
        return self._samples[: self.forward_input.num_rows]

    def begin(self, step: int) -> None:
        """Empty the batch for a new step. The set must have come back from the executor."""
        assert not self.in_flight, "a staging set was taken before its step was committed"
        forward = self.forward_input
        forward.step = step
        forward.num_rows = forward.num_decode_rows = forward.num_tokens = 0
        forward.num_table_diffs = forward.num_sampling_diffs = forward.num_saves = forward.num_loads = 0
        forward.num_speculating_rows = 0
        if forward.speculations:
            forward.speculations.clear()
        if forward.extras:
            forward.extras.clear()
        forward.masks = None
        self.entered.clear()
        if self.constrained:
            self.constrained = []
            self.ends.clear()
            self.dropped.clear()
        if forward.pooled:
            forward.pooled.clear()
            self.pooled = []
        self.all_sample = True
        self.recorded, self.chunks = None, ()

    def forget(self) -> None:
        """Hold no sequence and no adapter of a step that has ended."""
        assert not self.in_flight
        self.entered.clear()
        self.constrained, self.pooled = [], []
        # Of the rows of those: reset() looks whether there were any.
        self.ends.clear()
        self.dropped.clear()
        self.forward_input.adapter_loads = []

    def write_decodes(self, slots: IndexArray, starts: Int32Array) -> None:
        """Rows that continue by one token each; must be the first rows."""
        forward, staging, count = self.forward_input, self.staging, len(slots)
        assert forward.num_rows == 0
        self._slots[:count] = slots
        self._samples[:count] = True
        staging.row_slot[:count] = slots
        staging.row_start[:count] = starts
        staging.row_len[:count] = 1
        staging.row_samples[:count] = True
        staging.token_ids[:count] = FUTURE_TOKEN
        staging.qo_indptr[: count + 1] = self._arange[: count + 1]
        forward.num_rows = forward.num_decode_rows = forward.num_tokens = count

    def write_speculating(self, slots: IndexArray, starts: Int32Array, lengths: Int32Array) -> None:
        """Rows that continue by their last token and drafts, behind the decode rows and before all others."""
        forward, staging = self.forward_input, self.staging
        first, end, token = forward.num_rows, forward.num_rows + len(slots), forward.num_tokens
        assert first == forward.num_decode_rows
        self._slots[first:end] = slots
        self._samples[first:end] = True
        staging.row_slot[first:end] = slots
        staging.row_start[first:end] = starts
        staging.row_len[first:end] = lengths
        staging.row_samples[first:end] = True
        staging.qo_indptr[first] = token
        np.cumsum(lengths, out=staging.qo_indptr[first + 1 : end + 1])
        staging.qo_indptr[first + 1 : end + 1] += token
        forward.num_tokens = int(staging.qo_indptr[end])
        staging.token_ids[token : forward.num_tokens] = FUTURE_TOKEN
        forward.num_rows, forward.num_speculating_rows = end, len(slots)

    def is_speculating(self, row: int) -> bool:
        forward = self.forward_input
        return 0 <= row - forward.num_decode_rows < forward.num_speculating_rows

    def ask_for_masks(self, constrained: list[tuple[int, Sequence]], vocab_size: int) -> None:
        """The sampling of these rows waits for the host's grammar, at each of their positions."""
        self.constrained = constrained
        lengths = self.staging.row_len
        rows = [r for row, _ in constrained for r in [row] * (int(lengths[row]) if self.is_speculating(row) else 1)]
        self.forward_input.masks = TokenMasks(rows, vocab_size)

    def mask_bits(self) -> Iterator[tuple[int, Sequence, npt.NDArray[np.uint32]]]:
        """(row, sequence, uint32 [positions, words]) of each constrained row: views of the step's masks."""
        masks, first = self.forward_input.masks, 0
        assert masks is not None
        for row, sequence in self.constrained:
            count = int(np.count_nonzero(masks.rows[first:] == row)) if self.is_speculating(row) else 1
            yield row, sequence, masks.bits[first : first + count]
            first += count

    def write_prefill(self, slot: int, start: int, token_ids: Int32Array, samples: bool) -> None:
        """One chunk of a prompt, or of forced tokens."""
        forward, staging = self.forward_input, self.staging
        row, first, length = forward.num_rows, forward.num_tokens, len(token_ids)
        self._slots[row] = slot
        self._samples[row] = samples
        self.all_sample = self.all_sample and samples
        staging.row_slot[row] = slot
        staging.row_start[row] = start
        staging.row_len[row] = length
        staging.row_samples[row] = samples
        staging.token_ids[first : first + length] = token_ids
        if row == 0:
            staging.qo_indptr[0] = 0
        staging.qo_indptr[row + 1] = first + length
        forward.num_rows = row + 1
        forward.num_tokens = first + length

    def drop_sample(self, row: int, num_computed: int) -> None:
        """After the launch: what this row samples is not wanted. The sequence still belongs to the step.

        num_computed: tokens of it that are computed without the step, where the row is no chunk that starts before.
        """
        self._samples[row] = self.all_sample = False
        self.dropped[row] = num_computed

    def write_pooled(self, sequence: Sequence, ends: bool) -> None:
        """The chunk that was just written is of a sequence that asks for a vector; ends: it is the prompt's last."""
        pooling = sequence.request.pooling
        assert pooling is not None
        if ends or pooling.needs_all:
            self.forward_input.pooled.append(PooledRow(self.forward_input.num_rows - 1, pooling, ends))
        if ends:
            self.pooled.append(sequence)

    def write_page(self, group: int, slot: int, index: int, page: int) -> None:
        """One page-table entry. An entry is written at most once a step: a scatter has no order."""
        forward, staging = self.forward_input, self.staging
        count = forward.num_table_diffs
        staging.reserve_table_diff(count + 1)
        staging.table_index[count] = (group * self._num_slots + slot) * self._width + index
        staging.table_page[count] = page
        forward.num_table_diffs = count + 1

    def write_pages(self, group: int, slot: int, first: int, pages: npt.ArrayLike) -> None:
        """Entries of a group's page table of a slot, from index `first` on."""
        forward, staging = self.forward_input, self.staging
        ids = np.asarray(pages, np.int32)
        count, start = forward.num_table_diffs, (group * self._num_slots + slot) * self._width + first
        staging.reserve_table_diff(count + len(ids))
        staging.table_index[count : count + len(ids)] = np.arange(start, start + len(ids), dtype=np.int32)
        staging.table_page[count : count + len(ids)] = ids
        forward.num_table_diffs = count + len(ids)

    def write_save(self, slot: int, snapshot: int) -> None:
        """The state that a slot has before the step goes to a snapshot."""
        forward, staging, count = self.forward_input, self.staging, self.forward_input.num_saves
        # A snapshot that was taken off again in the meantime is the last one's: two copies to it have no order.
        where = int(np.argmax(staging.save_snapshot[:count] == snapshot)) if count else 0
        if not count or staging.save_snapshot[where] != snapshot:
            where = count
            forward.num_saves = count + 1
        staging.save_slot[where] = slot
        staging.save_snapshot[where] = snapshot

    def saves(self) -> dict[int, int]:
        """Slots by snapshot, as written so far."""
        staging, count = self.staging, self.forward_input.num_saves
        return dict(zip(staging.save_snapshot[:count].tolist(), staging.save_slot[:count].tolist(), strict=True))

    def write_load(self, slot: int, snapshot: int) -> None:
        """A slot goes on from a snapshot, which may be one of this step's saves."""
        forward, staging, count = self.forward_input, self.staging, self.forward_input.num_loads
        staging.load_slot[count] = slot
        staging.load_snapshot[count] = snapshot
        forward.num_loads = count + 1

    def write_sampling(self, sequence: Sequence, seed: int, adapter: int = 0, drafts: bool = False) -> None:
        """The sampling row of a newly filled slot, and the index of its adapter. drafts: it speculates."""
        forward, staging = self.forward_input, self.staging
        count = forward.num_sampling_diffs
        params: SamplingParams = sequence.request.sampling
        staging.sampling_slot[count] = sequence.slot
        staging.adapter[count] = adapter
        row = staging.sampling[count]
        row["temperature"] = params.temperature
        row["top_p"] = params.top_p
        row["min_p"] = params.min_p
        row["top_k"] = params.top_k
        row["seed"] = seed & 0xFFFF_FFFF_FFFF_FFFF
        row["min_length"] = sequence.min_length
        row["num_stop_ids"] = len(sequence.stop_ids)
        row["stop_ids"] = -1
        row["stop_ids"][: len(sequence.stop_ids)] = sequence.stop_ids
        forward.num_sampling_diffs = count + 1
        if drafts:
            prediction = sequence.request.prediction
            forward.speculations.append(
                RowSpeculation(
                    slot=sequence.slot,
                    history=np.array(sequence.token_ids, np.int32),
                    prediction=None if prediction is None else np.array(prediction, np.int32),
                    namespace=sequence.request.cache_root,
                )
            )
        if params.has_extras:
            forward.extras.append(
                RowExtras(
                    slot=sequence.slot,
                    history=sequence.token_ids.copy(),
                    num_prompt_tokens=sequence.num_prompt_tokens,
                    presence_penalty=params.presence_penalty,
                    frequency_penalty=params.frequency_penalty,
                    repetition_penalty=params.repetition_penalty,
                    logit_bias=params.logit_bias,
                    allowed_token_ids=params.allowed_token_ids,
                    bad_words=params.bad_words,
                    logprobs=params.logprobs,
                    prompt_logprobs=params.prompt_logprobs,
                )
            )


@dataclass(slots=True)
class StepResult:
    """What a step brought, overruns left out. Valid until the next commit.

    slots intp [n], token_ids int32 [n]: the row's new token, of a row that speculated the last. counts int32 [n]: its
    new tokens, None where each row has one. gaps float64: seconds since the slot's token before, NaN for its first; one
    for each new token. finished: sequences that ended with this step; some have left their slot already. cut: whose
    grammar ended, or failed, by a draft.
    at: when its commit began.
    logprobs: (sequence, index into ForwardOutput.logprobs, token). prompt_logprobs, pooled: whose the entries of those
    fields of ForwardOutput are, by index.
    """

    slots: IndexArray
    token_ids: Int32Array
    gaps: npt.NDArray[np.float64]
    finished: list[Sequence] = field(default_factory=list)
    logprobs: list[tuple[Sequence, int, int]] = field(default_factory=list)
    prompt_logprobs: list[tuple[Sequence, int]] = field(default_factory=list)
    pooled: list[tuple[Sequence, int]] = field(default_factory=list)
    counts: Int32Array | None = None
    cut: tuple[Sequence, ...] = ()
    at: float = 0.0

    @property
    def num_new(self) -> int:
        """New tokens of all rows."""
        return len(self.slots) if self.counts is None else int(self.counts.sum())

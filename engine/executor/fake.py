"""FakeExecutor: a device without torch that detects what a scheduler did wrong. For tests and benches.

It computes a two-layer "attention" over 64-bit hashes in every memory group: the KV cell of a token depends on all
cells before it in the group's window, the next token on all cells of the context that windows leave, and every read
goes through page tables fed by ForwardInput alone. So a wrong page, a page of another group, one that was given back
too early, a stale row or a lost diff changes a token or trips an assertion. fake_oracle.py computes the same tokens
directly. Runs on the thread of its caller.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.config import StartupError
from engine.executor.base import StepHandle
from engine.executor.fake_adapters import AdapterTables, read_fake_adapter
from engine.executor.fake_drafts import Drafter, Spread, accept, spread
from engine.executor.fake_memory import (
    MASK,
    STATE,
    U_11,
    U_32,
    U_POSITION,
    U_ROUND,
    U_TOKEN,
    Reads,
    States,
    UInt64Array,
    combine,
    mix,
    mix_int,
    round_of,
)
from engine.executor.fake_oracle import (
    FAKE_WIDTH,
    FakeModel,
    Oracle,
    counts_tokens,
    expected_logprob,
    extras_key,
    numbers_of,
    shapes_draws,
    unmasked,
    vector_of_all,
    vector_of_context,
)
from engine.executor.host_pages import HostPages
from engine.executor.tables import SlotTables, StepMetadata
from engine.forward import (
    FUTURE_TOKEN,
    NULL_SLOT,
    PARTS,
    Accepted,
    ForwardError,
    ForwardInput,
    ForwardOutput,
    Int32Array,
    Limits,
    RowExtras,
    Staging,
    StepLogprobs,
)
from engine.groups import name_of
from engine.lora.words import AdapterWeights

# What a row returns that read the leavings of a failed step. Such a row must never reach a client, so the
# value is no token id: an oracle sees it at once.
TAINTED_TOKEN = 2**31 - 2
# What `poison_staging` leaves behind; as a slot, a page or a token it is out of range everywhere.
POISON = -(2**30)


def poison_staging(staging: Staging) -> None:
    """Overwrite a set that nobody owns (after commit, before the next schedule), so that leftovers show."""
    for name in ("row_slot", "row_start", "row_len", "token_ids", "qo_indptr"):
        getattr(staging, name).fill(POISON)
    for name in (
        *("table_index", "table_page", "sampling_slot", "adapter"),
        *("save_slot", "save_snapshot", "load_slot", "load_snapshot"),
    ):
        getattr(staging, name).fill(POISON)
    staging.row_samples.fill(True)
    staging.sampling["temperature"] = 1.0
    staging.sampling["seed"] = 0xDEAD
    staging.sampling["min_length"] = 2**30


@dataclass(slots=True, eq=False)
class FakeHandle:
    """A launched step; output or error is set once it has run."""

    step: int
    forward_input: ForwardInput
    fingerprint: tuple[object, ...]
    done_at: float = 0.0
    output: ForwardOutput | None = None
    error: ForwardError | None = None


def _may_run(handle: FakeHandle) -> bool:
    masks = handle.forward_input.masks
    return masks is None or masks.is_ready


class FakeExecutor:
    """An `Executor` that reads staging as late as it may: between submit and wait, by default in wait.

    fail_on: called with the step's number as it runs; a ForwardError that it raises is the step's. The step
    then leaves garbage where it would have written KV and sampled tokens, as a device would.
    random, eagerness: at each submit, steps run at once with this probability, so that "when" is drawn too.
    step_seconds: what the device takes for a step; `wait` really waits. 0 resolves at once, without a sleep.
    compute: False returns `constant_token` for every row that samples and looks at nothing (for benches); half of the
    drafts that a row may have are right then.
    draft_accuracy: how many of the drafts are right, where limits.max_draft_tokens lets rows speculate.
    """

    def __init__(
        self,
        limits: Limits,
        model: FakeModel | None = None,
        *,
        fail_on: Callable[[int], None] | None = None,
        random: Random | None = None,
        eagerness: float = 0.0,
        step_seconds: float = 0.0,
        compute: bool = True,
        constant_token: int = 1,
        draft_accuracy: float = 0.7,
    ) -> None:
        assert limits.page_size > 0 and limits.num_pages > 0
        self.limits = limits
        windows = tuple(group.window for group in limits.groups)
        self.model = (
            model
            if model is not None
            else FakeModel(limits.vocab_size, windows=windows, has_state=limits.num_snapshots is not None)
        )
        assert len(self.model.windows) == len(windows), "the model has other memory groups"
        assert self.model.has_state == (limits.num_snapshots is not None), "the model has another kind of state"
        self.staging: tuple[Staging, Staging] = (Staging(limits), Staging(limits))
        self.tables = SlotTables(limits)
        self.num_steps = 0
        # A row that speculates is computed as one for each of its positions.
        wide = dataclasses.replace(limits, max_num_seqs=limits.max_num_batched_tokens)
        self._metadata = StepMetadata(wide if limits.max_draft_tokens else limits)
        self._drafter = Drafter(self.model.vocab_size, limits.max_draft_tokens, draft_accuracy)
        self._fail_on = fail_on
        self._random = random
        self._eagerness = eagerness if random is not None else 0.0
        self._step_seconds = step_seconds
        self._compute = compute
        self._constant_token = constant_token
        self._closed = False
        self.sleep_level = 0
        self.asleep: set[str] = set()
        self.weights: Path | None = None  # where they came from; they change no token
        self._last_step: int | None = None
        self._device_free_at = 0.0
        self._not_run: deque[FakeHandle] = deque()
        self._not_waited: deque[FakeHandle] = deque()
        # Two output buffers in turn: a receiver that keeps an output too long sees it change.
        self._outputs = [np.zeros(limits.max_num_seqs, np.int32) for _ in range(2)]
        cells = (limits.num_pages + 1) * limits.page_size
        # Per KV cell: which position and group it was written for (-1: never), and two layers of hashes.
        self._cell_group: Int32Array = np.full(cells, -1, np.int32)
        self._cell_position: Int32Array = np.full(cells, -1, np.int32)
        self._cell_tainted = np.zeros(cells, np.bool_)
        self._layer0: UInt64Array = np.zeros(cells, np.uint64)
        self._layer1: UInt64Array = np.zeros(cells, np.uint64)
        # The relay: the token sampled last in a slot, and the position that it was sampled for.
        self._last_token: Int32Array = np.full(limits.num_slots, POISON, np.int32)
        self._last_position: Int32Array = np.full(limits.num_slots, -1, np.int32)
        # Recurrent states: of slots first, then of snapshots.
        self._states = States(limits.num_slots + (limits.num_snapshots or 0))
        # What slots need beyond their sampling row, and a sum over the tokens that penalties count from.
        self._extras: dict[int, RowExtras] = {}
        self._history: dict[int, int] = {}
        self._adapters = AdapterTables(limits)
        # By slot: tokens that a mean has seen, and the sum of their numbers.
        self._sums: dict[int, tuple[int, npt.NDArray[np.float64]]] = {}

    # The Executor protocol.

    def submit(self, forward_input: ForwardInput) -> FakeHandle:
        """Launch a step; see `Executor.submit`."""
        step = forward_input.step
        assert not self._closed, "submit after close"
        assert self._last_step is None or step == self._last_step + 1, f"step {step} after {self._last_step}"
        assert forward_input.staging is self.staging[step % 2], "the staging sets must alternate"
        assert len(self._not_waited) < 2, "a third step in flight, with two staging sets"
        self._last_step = step
        self.num_steps += 1
        handle = FakeHandle(step, forward_input, _fingerprint(forward_input) if self._compute else ())
        if self._step_seconds:
            self._device_free_at = max(self._device_free_at, time.monotonic()) + self._step_seconds
            handle.done_at = self._device_free_at
        self._not_run.append(handle)
        self._not_waited.append(handle)
        if self._random is not None:
            while self._not_run and self._random.random() < self._eagerness and _may_run(self._not_run[0]):
                self._run(self._not_run.popleft())
        return handle

    def provide_masks(self, handle: StepHandle) -> None:
        """See `Executor.provide_masks`; a step that needs them has not run yet."""
        assert isinstance(handle, FakeHandle) and handle.forward_input.masks is not None
        assert handle.output is None and handle.forward_input.masks.is_ready

    async def wait(self, handle: StepHandle) -> ForwardOutput:
        """Wait for a step; see `Executor.wait`."""
        assert isinstance(handle, FakeHandle)
        if self._step_seconds:
            remaining = handle.done_at - time.monotonic()
            if remaining > 0.0:
                await asyncio.sleep(remaining)
        return self.resolve(handle)

    def close(self) -> None:
        """Finish what is launched. Idempotent."""
        self._closed = True
        while self._not_run:
            self._run(self._not_run.popleft())

    def sleep(self, level: int, parts: Collection[str] = PARTS) -> None:
        """See Executor.sleep. What the KV cells and page tables held is gone."""
        assert not self._not_waited, "a step is in flight"
        assert not self.asleep.intersection(parts) and level in (1, 2) and self.sleep_level in (0, level)
        self.sleep_level = level
        self.asleep |= set(parts)
        self._adapters.forget()
        if "kv_cache" not in parts:
            return
        self.tables.page_tables.fill(0)
        self._cell_position.fill(-1)
        self._states.position.fill(-1)
        self._layer0.fill(0)
        self._layer1.fill(0)

    def wake_up(self, directory: Path | None = None, parts: Collection[str] = PARTS) -> None:
        """See Executor.wake_up."""
        assert self.sleep_level and self.asleep.intersection(parts)
        if self.sleep_level == 2 and "weights" in self.asleep.intersection(parts):
            self.weights = self._read(directory or self.weights)
        self.asleep -= set(parts)
        if not self.asleep:
            self.sleep_level = 0

    def load_weights(self, directory: Path) -> None:
        """See Executor.load_weights: any directory that is there will do."""
        assert not self._not_waited and "weights" not in self.asleep
        self.weights = self._read(directory)

    def read_adapter(self, path: Path) -> AdapterWeights:
        """See Executor.read_adapter."""
        return read_fake_adapter(path)

    def page_memory(self) -> HostPages:
        """See Executor.page_memory: what the cells hold, and what they were written for."""
        cells = self._cell_group, self._cell_position, self._cell_tainted, self._layer0, self._layer1
        size = self.limits.page_size
        pages = [array.view(np.uint8).reshape(self.limits.num_pages + 1, size * array.itemsize) for array in cells]
        return HostPages(pages, f"fake {self.model.vocab_size} page {size}{name_of(self.limits.groups)}")

    def state_memory(self) -> HostPages | None:
        """See Executor.state_memory: what the states are, and of how many tokens."""
        if not self.model.has_state:
            return None
        if not self.limits.num_snapshots:
            raise StartupError("there is no room for a snapshot of this model's recurrent state beside the pages")
        first, states = self.limits.num_slots - 1, self._states
        arrays = [array[first:] for array in (states.value, states.position, states.tainted)]
        return HostPages([array.view(np.uint8).reshape(len(array), -1) for array in arrays], "fake state")

    @staticmethod
    def _read(directory: Path | None) -> Path | None:
        if directory is not None and not directory.is_dir():
            raise StartupError(f"{directory}: no such directory")
        return directory

    # What the simulator uses besides.

    def resolve(self, handle: FakeHandle) -> ForwardOutput:
        """`wait` without an event loop: runs what has not run yet, in the order of submission."""
        assert self._not_waited and self._not_waited[0] is handle, "steps are waited for once, in order"
        self._not_waited.popleft()
        while handle.output is None and handle.error is None:
            self._run(self._not_run.popleft())
        if handle.error is not None:
            raise handle.error
        assert handle.output is not None
        return handle.output

    def end_of(self, slot: int, row_len: int) -> int:
        """Tokens of a slot that are computed after its next row, which speculates."""
        return int(self._last_position[slot]) + min(row_len, 1 + len(self._drafter.held.get(slot, [])))

    def pages_of(self, slot: int, num_tokens: int, group: int = 0) -> list[int]:
        """The device's page-table row of a slot, as far as num_tokens tokens reach."""
        width = -(-num_tokens // self.limits.page_size)
        pages: list[int] = self.tables.page_tables[group, slot, :width].tolist()
        return pages

    # The device.

    def _run(self, handle: FakeHandle) -> None:
        forward_input = handle.forward_input
        output = self._outputs[handle.step % 2][: forward_input.num_rows]
        if not self._compute:
            output.fill(self._constant_token)
            output[~forward_input.staging.row_samples[: forward_input.num_rows]] = -1
            handle.output = ForwardOutput(output, handle.step)
            if forward_input.num_speculating_rows:
                handle.output.accepted = self._accept_half(forward_input)
            handle.output.pooled = [np.zeros(FAKE_WIDTH, np.float32) for row in forward_input.pooled if row.ends]
            return
        untouched = _fingerprint(forward_input) == handle.fingerprint
        assert untouched, "staging changed while its step was in flight"
        self._check(forward_input)
        try:
            if self._fail_on is not None:
                self._fail_on(handle.step)
            failed = False
        except ForwardError as error:
            handle.error = error
            failed = True
        self.tables.apply(forward_input)
        self._copy_states(forward_input)
        self._take_extras(forward_input)
        self._adapters.apply(forward_input)
        if not forward_input.num_speculating_rows:
            vectors = self._forward(forward_input, output, failed)
            result = ForwardOutput(output, handle.step, pooled=vectors)
        else:
            parts = spread(forward_input, self._last_token, self._last_position, self._drafter.held)
            drawn = np.zeros(parts.step.num_rows, np.int32)
            vectors = self._forward(parts.step, drawn, failed, parts)
            result = ForwardOutput(output, handle.step, pooled=vectors, accepted=self._accept(parts, drawn, output))
        if not failed:
            if self.limits.max_draft_tokens:
                self._draft(forward_input, result)
            if self._extras:
                result.logprobs = self._logprobs(forward_input, result)
            handle.output = result
        else:
            self._drafter.lost.update(forward_input.staging.row_slot[: forward_input.num_rows].tolist())

    def _accept(self, parts: Spread, drawn: Int32Array, output: Int32Array) -> Accepted:
        """Fills in the tokens of the step's own rows, and those of the relay."""
        begin, count = parts.step.num_decode_rows, len(parts.drafts)
        sampled = [
            drawn[first : first + 1 + len(drafts)].tolist()
            for first, drafts in zip(parts.first, parts.drafts, strict=True)
        ]
        accepted, kept = accept(parts.drafts, sampled, self.limits.max_draft_tokens)
        end = parts.first[-1] + 1 + len(parts.drafts[-1])
        output[:begin], output[begin + count :] = drawn[:begin], drawn[end:]
        output[begin : begin + count] = [tokens[-1] for tokens in kept]
        for first, tokens in zip(parts.first, kept, strict=True):
            slot = int(parts.step.staging.row_slot[first])
            self._last_token[slot] = tokens[-1]
            self._last_position[slot] += len(tokens)
            if slot in self._history:
                self._history[slot] = (self._history[slot] + sum(map(mix_int, tokens))) & MASK
        return accepted

    def _accept_half(self, forward_input: ForwardInput) -> Accepted:
        first, count, most = (
            forward_input.num_decode_rows,
            forward_input.num_speculating_rows,
            self.limits.max_draft_tokens,
        )
        drafted = forward_input.staging.row_len[first : first + count] - 1
        counts = 1 + (drafted + 1) // 2
        tokens = np.where(np.arange(1 + most) < counts[:, None], self._constant_token, -1).astype(np.int32)
        return Accepted(counts, tokens, drafted, np.full((count, most), self._constant_token, np.int32))

    def _draft(self, forward_input: ForwardInput, result: ForwardOutput) -> None:
        """At the end of a step: what each slot's next row brings."""
        staging, drafter = forward_input.staging, self._drafter
        first, count = forward_input.num_decode_rows, forward_input.num_speculating_rows
        for row, slot in enumerate(staging.row_slot[: forward_input.num_rows].tolist()):
            if slot in drafter.lost:
                continue
            if not drafter.speculates(slot):
                assert not first <= row < first + count, f"slot {slot} speculates, and nobody said so"
                continue
            tokens = [int(result.token_ids[row])] if staging.row_samples[row] else []
            if first <= row < first + count:
                assert result.accepted is not None
                tokens = result.accepted.tokens[row - first, : result.accepted.counts[row - first]].tolist()
            elif row >= first:
                known = staging.token_ids[staging.qo_indptr[row] : staging.qo_indptr[row + 1]].tolist()
                drafter.chunk(slot, int(staging.row_start[row]), known)
            if not tokens:
                continue
            if max(tokens) >= self.model.vocab_size:
                drafter.drop(slot)  # of a failed step: it does not go on
                continue
            drafts = drafter.sampled(slot, int(self._last_position[slot]) - len(tokens) + 1, tokens)
            if first <= row < first + count:
                assert result.accepted is not None
                result.accepted.drafts[row - first, : len(drafts)] = drafts
            elif row >= first:
                result.new_drafts.append((row, np.array(drafts, np.int32)))

    def _check(self, forward_input: ForwardInput) -> None:
        """What can be said of a step from itself."""
        limits, staging, rows = self.limits, forward_input.staging, forward_input.num_rows
        decode_rows, tokens = forward_input.num_decode_rows, forward_input.num_tokens
        assert 0 < rows <= limits.max_num_seqs and 0 <= decode_rows <= rows
        assert 0 < tokens <= limits.max_num_batched_tokens, f"{tokens} tokens are over the budget"
        slots: list[int] = staging.row_slot[:rows].tolist()
        assert len(set(slots)) == rows, f"a slot stands twice in {slots}"
        assert min(slots) >= 1 and max(slots) <= limits.max_num_seqs, f"slots out of range: {slots}"
        lengths: list[int] = staging.row_len[:rows].tolist()
        starts: list[int] = staging.row_start[:rows].tolist()
        assert min(lengths) >= 1 and sum(lengths) == tokens, f"{lengths} for {tokens} tokens"
        assert all(length == 1 for length in lengths[:decode_rows]), "a decode row is one token"
        speculating = lengths[decode_rows : decode_rows + forward_input.num_speculating_rows]
        assert len(speculating) == forward_input.num_speculating_rows, "rows speculate that are not there"
        assert max(speculating, default=0) <= 1 + limits.max_draft_tokens, "a row has too many drafts"
        assert min(starts) >= 0
        kv_lengths = [start + length for start, length in zip(starts, lengths, strict=True)]
        assert max(kv_lengths) <= limits.max_model_len, f"contexts {kv_lengths} are too long"
        offsets: list[int] = staging.qo_indptr[: rows + 1].tolist()
        total = 0
        for offset, length in zip(offsets, [*lengths, 0], strict=True):
            assert offset == total, f"qo_indptr {offsets} for lengths {lengths}"
            total += length
        token_ids: list[int] = staging.token_ids[:tokens].tolist()
        future = decode_rows + sum(speculating)
        assert all(token == FUTURE_TOKEN for token in token_ids[:future]), "decode rows read the relay"
        known = token_ids[future:]
        assert all(0 <= token < limits.vocab_size for token in known), f"token ids out of range: {known}"
        continuing = decode_rows + len(speculating)
        assert bool(staging.row_samples[:continuing].all()), "a decode row that does not sample"
        pooled = [row.row for row in forward_input.pooled]
        assert pooled == sorted(set(pooled)), f"pooled rows {pooled}"
        assert all(continuing <= row < rows and not staging.row_samples[row] for row in pooled), "a pooled row samples"
        count = forward_input.num_table_diffs
        if count:
            index: list[int] = staging.table_index[:count].tolist()
            # A scatter on a device has no order: an entry that stands twice is a race.
            assert len(set(index)) == count, "a page-table entry stands twice in one diff"
            assert min(index) >= 0 and max(index) < self.tables.page_tables.size
            rows_of = [place // limits.max_pages_per_seq % limits.num_slots for place in index]
            assert NULL_SLOT not in rows_of, "the page table of the null slot changes"
            pages = staging.table_page[:count]
            assert int(pages.min()) >= 0 and int(pages.max()) <= limits.num_pages, "page id out of range"
        count = forward_input.num_sampling_diffs
        if count:
            changed: list[int] = staging.sampling_slot[:count].tolist()
            assert len(set(changed)) == count, "a sampling row stands twice in one diff"
            assert min(changed) >= 1 and max(changed) <= limits.max_num_seqs
        self._adapters.check(forward_input)

    def _forward(
        self, forward_input: ForwardInput, output: Int32Array, failed: bool, parts: Spread | None = None
    ) -> list[npt.NDArray[np.float32]]:
        """Fills in the tokens; returns the vectors of pooled rows. parts: how the step's rows came to be."""
        limits, rows = self.limits, forward_input.num_rows
        decode_rows, num_tokens = forward_input.num_decode_rows, forward_input.num_tokens
        staging = forward_input.staging
        metadata = self._metadata.build(forward_input, self.tables)
        slots, starts, kv_len = staging.row_slot[:rows], staging.row_start[:rows], metadata.kv_len
        reads = [
            Reads(metadata, self.tables.page_tables[group], limits.page_size, slots, starts, window)
            for group, window in enumerate(self.model.windows)
        ]

        token_ids = staging.token_ids[:num_tokens].copy()
        row_tainted = np.zeros(rows, np.bool_)
        if decode_rows:
            decoding = slots[:decode_rows]
            stale = self._last_position[decoding] != starts[:decode_rows]
            assert not stale.any(), (
                f"slots {decoding[stale].tolist()} continue at {starts[:decode_rows][stale].tolist()}, but "
                f"their last tokens are for {self._last_position[decoding][stale].tolist()}"
            )
            token_ids[:decode_rows] = self._last_token[decoding]
        row_tainted |= token_ids[staging.qo_indptr[:rows]] == TAINTED_TOKEN
        if self.model.has_state:
            row_tainted |= self._states.begin(slots, starts)

        # Layer 0: as on a device, all rows write before any row reads.
        written = np.sort(np.concatenate([own.kv_slots for own in self._metadata.of_groups]))
        assert not (written[1:] == written[:-1]).any(), "two rows write the same KV cell"
        mixed = token_ids.astype(np.uint64) * U_TOKEN + metadata.positions.astype(np.uint64) * U_POSITION
        keys = self._adapters.keys(forward_input)
        if keys is not None:
            mixed += keys
        for group, own in enumerate(self._metadata.of_groups):
            self._cell_group[own.kv_slots] = group
            self._cell_position[own.kv_slots] = own.positions
            self._layer0[own.kv_slots] = mix(mixed + np.uint64(round_of(group)))
        for group, read in enumerate(reads):
            read.check(group, self._cell_position, self._cell_group)
        self._spread_taint(forward_input, reads, row_tainted, failed)

        # Layer 1 of this step's tokens: a hash over layer 0 up to each. Then what rows draw from: sums over layer 1.
        totals = []
        for read, own in zip(reads, self._metadata.of_groups, strict=True):
            self._layer1[own.kv_slots] = mix(read.sums(self._layer0)[read.positions >= starts[read.rows]])
            totals.append(read.totals(self._layer1))
        if self.model.has_state:
            terms = np.add.reduceat(mix(mixed + np.uint64(STATE)), metadata.qo_indptr[:-1])
            totals.append(self._states.advance(slots, terms, staging.row_len[:rows], row_tainted))
        draws = mix(combine(totals) ^ U_ROUND)
        vectors = self._pool(forward_input, draws, row_tainted) if forward_input.pooled else []
        if self._extras:
            self._shape(draws, slots, parts)
        tokens = self._sample(draws, self.tables.sampling[slots], kv_len)
        if forward_input.masks is not None:
            masked = forward_input.masks.rows.tolist() if parts is None else parts.places
            for row, allowed in zip(masked, forward_input.masks.allowed(limits.vocab_size), strict=True):
                if row >= 0 and not allowed[tokens[row]]:
                    choices = np.flatnonzero(allowed)
                    tokens[row] = choices[int(draws[row]) % len(choices)]
        tokens[row_tainted] = TAINTED_TOKEN
        samples = staging.row_samples[:rows]
        sampling_slots = slots[samples]
        self._last_token[sampling_slots] = tokens[samples]
        self._last_position[sampling_slots] = kv_len[samples]
        output[:] = np.where(samples, tokens, -1)
        if parts is not None:
            end = parts.first[-1] + 1 + len(parts.drafts[-1])
            output[decode_rows:end] = tokens[decode_rows:end]
        for slot, token in zip(sampling_slots.tolist(), tokens[samples].tolist(), strict=True) if self._extras else ():
            if slot in self._history:
                self._history[slot] = (self._history[slot] + mix_int(token)) & MASK
        return vectors

    def _copy_states(self, forward_input: ForwardInput) -> None:
        """Saves, then loads."""
        staging, first = forward_input.staging, self.limits.num_slots - 1
        count = forward_input.num_saves
        if count:
            snapshots = staging.save_snapshot[:count]
            assert len(set(snapshots.tolist())) == count, "two states are saved to one snapshot"
            self._states.copy(staging.save_slot[:count], first + snapshots)
        count = forward_input.num_loads
        if count:
            self._states.copy(first + staging.load_snapshot[:count], staging.load_slot[:count])

    def _pool(
        self, forward_input: ForwardInput, draws: UInt64Array, row_tainted: npt.NDArray[np.bool_]
    ) -> list[npt.NDArray[np.float32]]:
        """Vectors of the rows that end; NaN where something of a failed step is in them."""
        staging = forward_input.staging
        vectors = []
        for pooled in forward_input.pooled:
            row, pooling = pooled.row, pooled.pooling
            if not pooling.needs_all:
                vector = vector_of_context(int(draws[row]), pooling)
            else:
                slot, start = int(staging.row_slot[row]), int(staging.row_start[row])
                seen, total = self._sums.pop(slot, (0, np.zeros(FAKE_WIDTH))) if start else (0, np.zeros(FAKE_WIDTH))
                assert seen == start, f"a mean over {start} tokens has seen {seen} of them"
                own = slice(staging.qo_indptr[row], staging.qo_indptr[row + 1])
                above = combine([self._layer1[group.kv_slots[own]] for group in self._metadata.of_groups])
                seen, total = seen + len(above), total + numbers_of(above).sum(axis=0)
                if row_tainted[row]:
                    total[:] = np.nan
                if not pooled.ends:
                    self._sums[slot] = seen, total
                    continue
                vector = vector_of_all(total / seen, pooling, seen)
            if row_tainted[row]:
                vector[:] = np.nan
            vectors.append(vector)
        return vectors

    def _spread_taint(
        self, forward_input: ForwardInput, reads: list[Reads], row_tainted: npt.NDArray[np.bool_], failed: bool
    ) -> None:
        """Mark what depends on a failed step, row by row and cell by cell; in place."""
        lengths = forward_input.staging.row_len[: forward_input.num_rows]
        written = [own.kv_slots for own in self._metadata.of_groups]
        for kv_slots in written:
            self._cell_tainted[kv_slots] = failed
        if failed:
            row_tainted[:] = True
        elif row_tainted.any() or any(self._cell_tainted[read.cells].any() for read in reads):
            # Rows of one step may read each other's pages, so until nothing changes.
            count = -1
            while count != (count := int(row_tainted.sum())):
                for read, kv_slots in zip(reads, written, strict=True):
                    self._cell_tainted[kv_slots] = np.repeat(row_tainted, lengths)
                    row_tainted |= np.logical_or.reduceat(self._cell_tainted[read.cells], read.bases)

    def _take_extras(self, forward_input: ForwardInput) -> None:
        """Of each slot with a new sampling row: its extras, or none any more."""
        filled: list[int] = forward_input.staging.sampling_slot[: forward_input.num_sampling_diffs].tolist()
        for slot in filled:
            self._extras.pop(slot, None)
            self._history.pop(slot, None)
            self._drafter.drop(slot)
        for extras in forward_input.extras:
            assert extras.slot in filled and extras.slot not in self._extras, "extras come once, with a sampling row"
            assert 0 < extras.num_prompt_tokens <= len(extras.history)
            self._extras[extras.slot] = extras
            self._history[extras.slot] = sum(mix_int(token) for token in extras.history.tolist()) & MASK
        for given in forward_input.speculations:
            assert given.slot in filled and self.limits.max_draft_tokens, "a slot speculates without a sampling row"
            row = self.tables.sampling[given.slot]
            stop_ids = set(row["stop_ids"][: row["num_stop_ids"]].tolist())
            adapter = self._adapters.number_of(given.slot)
            self._drafter.begin(given, Oracle(self.model, row, self._extras.get(given.slot), stop_ids, adapter))

    def _shape(self, draws: UInt64Array, slots: Int32Array, parts: Spread | None) -> None:
        """Draws of rows with extras, in place. Those of a draft's row count the drafts up to it."""
        ahead: dict[int, int] = {}
        if parts is not None:
            for first, drafts in zip(parts.first, parts.drafts, strict=True):
                for place in range(1 + len(drafts)):
                    ahead[first + place] = sum(map(mix_int, drafts[:place]))
        for row, slot in enumerate(slots.tolist()):
            extras = self._extras.get(slot)
            if extras is not None and shapes_draws(extras):
                history = (self._history[slot] + ahead.get(row, 0)) & MASK
                key = extras_key(extras) ^ (history if counts_tokens(extras) else 0)
                draws[row] = mix_int(int(draws[row]) ^ mix_int(key))

    def _logprobs(self, forward_input: ForwardInput, result: ForwardOutput) -> StepLogprobs | None:
        """Of the rows that sampled and asked. Top ids are the ones after the token. Prompts get none."""
        staging, accepted = forward_input.staging, result.accepted
        rows: list[int] = []
        tokens: list[int] = []
        positions: list[int] = []
        width, first = 0, forward_input.num_decode_rows
        for row, slot in enumerate(staging.row_slot[: forward_input.num_rows].tolist()):
            extras = self._extras.get(slot)
            if extras is not None and extras.logprobs is not None and staging.row_samples[row]:
                new = [int(result.token_ids[row])]
                if accepted is not None and first <= row < first + len(accepted.counts):
                    new = accepted.tokens[row - first, : accepted.counts[row - first]].tolist()
                rows += [row] * len(new)
                tokens += new
                end = int(self._last_position[slot])
                positions += range(end - len(new) + 1, end + 1)
                width = max(width, extras.logprobs)
        if not rows:
            return None
        top_ids = (np.array(tokens)[:, None] + np.arange(width)) % self.model.vocab_size
        pairs = zip(tokens, positions, strict=True)
        own = np.array([expected_logprob(token, position) for token, position in pairs], np.float32)
        top = (own[:, None] - np.arange(width)).astype(np.float32)
        return StepLogprobs(np.array(rows, np.int32), own, np.ones(len(rows), np.int32), top_ids.astype(np.int32), top)

    def _sample(self, draws: UInt64Array, sampling: npt.NDArray[Any], kv_len: Int32Array) -> Int32Array:
        model = self.model
        hot = sampling["temperature"] > 0.0
        if hot.any():
            temperature, top_p, min_p = (
                np.ascontiguousarray(sampling[name]).view(np.uint32).astype(np.uint64)
                for name in ("temperature", "top_p", "min_p")
            )
            top_k = sampling["top_k"].astype(np.uint64)
            key = mix(temperature + (top_p << U_32)) ^ mix(min_p + (top_k << U_32) + U_ROUND)
            key ^= mix(sampling["seed"])
            key += kv_len.astype(np.uint64) * U_POSITION
            draws = np.where(hot, mix(draws ^ mix(key)), draws)
        tokens = (draws % np.uint64(model.vocab_size)).astype(np.int32)
        if model.eos_rate:
            tokens[draws >> U_11 < np.uint64(model.eos_threshold)] = model.eos_token_id
        masked = kv_len < sampling["min_length"]
        for row in np.flatnonzero(masked).tolist():
            stop_ids = set(sampling["stop_ids"][row, : sampling["num_stop_ids"][row]].tolist())
            tokens[row] = unmasked(int(tokens[row]), stop_ids, model.vocab_size)
        return tokens


def _fingerprint(forward_input: ForwardInput) -> tuple[object, ...]:
    """All that a step may read, by value."""
    staging, rows = forward_input.staging, forward_input.num_rows
    diffs, changed = forward_input.num_table_diffs, forward_input.num_sampling_diffs
    return (
        forward_input.step,
        rows,
        forward_input.num_decode_rows,
        forward_input.num_tokens,
        diffs,
        changed,
        staging.row_slot[:rows].tobytes(),
        staging.row_start[:rows].tobytes(),
        staging.row_len[:rows].tobytes(),
        staging.row_samples[:rows].tobytes(),
        staging.qo_indptr[: rows + 1].tobytes(),
        staging.token_ids[: forward_input.num_tokens].tobytes(),
        staging.table_index[:diffs].tobytes(),
        staging.table_page[:diffs].tobytes(),
        staging.sampling_slot[:changed].tobytes(),
        staging.sampling[:changed].tobytes(),
        staging.adapter[:changed].tobytes(),
        tuple(forward_input.adapter_loads),
        staging.save_slot[: forward_input.num_saves].tobytes(),
        staging.save_snapshot[: forward_input.num_saves].tobytes(),
        staging.load_slot[: forward_input.num_loads].tobytes(),
        staging.load_snapshot[: forward_input.num_loads].tobytes(),
        tuple((extras.slot, extras.history.tobytes()) for extras in forward_input.extras),
        forward_input.num_speculating_rows,
        tuple((given.slot, given.history.tobytes()) for given in forward_input.speculations),
        tuple(forward_input.pooled),
    )

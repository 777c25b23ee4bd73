"""FakeExecutor: a device without torch that detects what a scheduler did wrong. For tests and benches.

It computes a two-layer "attention" over 64-bit hashes in every memory group: the KV cell of a token depends on all
cells before it in the group's window, the next token on all cells of the context that windows leave, and every read
goes through page tables fed by ForwardInput alone. So a wrong page, a page of another group, one that was given back
too early, a stale row or a lost diff changes a token or trips an assertion. fake_oracle.py computes the same tokens
directly. Runs on the thread of its caller.
"""

from __future__ import annotations

import asyncio
import operator
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from random import Random

import numpy as np
import numpy.typing as npt

from engine.config import StartupError
from engine.executor.base import StepHandle
from engine.executor.fake_adapters import AdapterTables, read_fake_adapter
from engine.executor.fake_checks import POISON, check_step, fingerprint_of
from engine.executor.fake_drafts import Drafter, Spread, accept, spread
from engine.executor.fake_memory import (
    MASK,
    POSITION,
    ROUND,
    STATE,
    TOKEN,
    Cells,
    Reads,
    SnapshotPages,
    States,
    combine_ints,
    mix_int,
    round_of,
)
from engine.executor.fake_oracle import (
    FAKE_WIDTH,
    Draws,
    FakeModel,
    Oracle,
    expected_logprob,
    numbers_of,
    vector_of_all,
    vector_of_context,
)
from engine.executor.host_pages import HostPages
from engine.executor.tables import SlotTables
from engine.forward import (
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


@dataclass(slots=True, eq=False)
class FakeHandle:
    """A launched step; output or error is set once it has run."""

    step: int
    forward_input: ForwardInput
    fingerprint: tuple[object, ...]
    done_at: float = 0.0
    began_at: float = 0.0
    ended_at: float = 0.0
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
    draft_accuracy: how many of the drafts are right, where limits.max_draft_tokens lets rows speculate. unseen_drafts:
    those of rows under a grammar are told no sooner than their step has begun.
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
        unseen_drafts: bool = False,
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
        self._drafter = Drafter(self.model.vocab_size, limits.max_draft_tokens, draft_accuracy, unseen_drafts)
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
        self._cells = Cells(limits.num_pages, limits.page_size, len(windows))
        # The relay: the token sampled last in a slot, and the position that it was sampled for.
        self._last_token = [POISON] * limits.num_slots
        self._last_position = [-1] * limits.num_slots
        # Recurrent states: of slots first, then of snapshots.
        self._states = States(limits.num_slots + (limits.num_snapshots or 0))
        # How slots sample, by their sampling row as it is now.
        self._draws: dict[int, Draws] = {}
        # What slots need beyond it, and a sum over the tokens that penalties count from.
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
        handle = FakeHandle(step, forward_input, fingerprint_of(forward_input) if self._compute else ())
        if self._step_seconds:
            self._device_free_at = max(self._device_free_at, time.monotonic()) + self._step_seconds
            handle.done_at = self._device_free_at
        self._not_run.append(handle)
        self._not_waited.append(handle)
        if self._random is not None:
            while self._not_run and self._random.random() < self._eagerness and _may_run(self._not_run[0]):
                self._run(self._not_run.popleft())
        return handle

    def unseen_drafts(self, handle: StepHandle) -> Awaitable[list[tuple[int, Int32Array]]] | None:
        """See Executor."""
        assert isinstance(handle, FakeHandle) and self._not_waited[0] is handle, "a step before it has not ended"
        return self._drafter.tell(handle.forward_input) if self._drafter.unseen else None

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
        self._cells.forget()
        self._states.position[:] = [-1] * len(self._states.position)

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

    def drop_adapters(self, indices: Sequence[int]) -> None:
        """See Executor.drop_adapters."""
        assert not self._not_waited, "a step is in flight"
        self._adapters.drop(indices)

    def page_memory(self) -> HostPages:
        """See Executor.page_memory: what the cells hold, and what they were written for."""
        layout = f"fake {self.model.vocab_size} page {self.limits.page_size}{name_of(self.limits.groups)}"
        return HostPages(self._cells.parts(), layout)

    def state_memory(self) -> SnapshotPages | None:
        """See Executor.state_memory: what the states are, and of how many tokens."""
        if not self.model.has_state:
            return None
        if not self.limits.num_snapshots:
            raise StartupError("there is no room for a snapshot of this model's recurrent state beside the pages")
        return SnapshotPages(self._states, self.limits.num_slots - 1)

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
        return self._last_position[slot] + min(row_len, 1 + len(self._drafter.held.get(slot, [])))

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
        untouched = fingerprint_of(forward_input) == handle.fingerprint
        assert untouched, "staging changed while its step was in flight"
        check_step(forward_input, self.tables)
        self._adapters.check(forward_input)
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
            self._states.settle(slot, len(tokens))
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
            drafts = drafter.sampled(slot, self._last_position[slot] - len(tokens) + 1, tokens)
            if first <= row < first + count:
                assert result.accepted is not None
                if not drafter.hides(forward_input, row):
                    result.accepted.drafts[row - first, : len(drafts)] = drafts
            elif row >= first and not drafter.hides(forward_input, row):
                result.new_drafts.append((row, np.array(drafts, np.int32)))

    def _forward(
        self, forward_input: ForwardInput, output: Int32Array, failed: bool, parts: Spread | None = None
    ) -> list[npt.NDArray[np.float32]]:
        """Fills in the tokens; returns the vectors of pooled rows. parts: how the step's rows came to be."""
        model, rows, page_size = self.model, forward_input.num_rows, self.limits.page_size
        staging, decode_rows = forward_input.staging, forward_input.num_decode_rows
        slots: list[int] = staging.row_slot[:rows].tolist()
        starts: list[int] = staging.row_start[:rows].tolist()
        lengths: list[int] = staging.row_len[:rows].tolist()
        offsets: list[int] = staging.qo_indptr[:rows].tolist()
        samples: list[bool] = staging.row_samples[:rows].tolist()
        ends = list(map(operator.add, starts, lengths))
        reads = [
            Reads(self._cells, group, window, self.tables.page_tables[group], page_size, slots, starts, ends)
            for group, window in enumerate(model.windows)
        ]
        token_ids: list[int] = staging.token_ids[: forward_input.num_tokens].tolist()
        for row in range(decode_rows):
            slot, position = slots[row], self._last_position[slots[row]]
            assert position == starts[row], (
                f"slot {slot} continues at {starts[row]}, but its last tokens are for {position}"
            )
            token_ids[row] = self._last_token[slot]
        row_tainted = [token_ids[offset] == TAINTED_TOKEN for offset in offsets]
        if model.has_state:
            row_tainted = list(map(operator.or_, row_tainted, self._states.begin(slots, starts, lengths)))

        # Layer 0: as on a device, all rows write before any row reads.
        written = list(chain.from_iterable([read.written for read in reads]))
        assert len(set(written)) == len(written), "two rows write the same KV cell"
        positions = list(chain.from_iterable(map(range, starts, ends)))
        mixed = [token * TOKEN + position * POSITION for token, position in zip(token_ids, positions, strict=True)]
        if any(keys := self._adapters.keys(slots)):
            for offset, length, key in zip(offsets, lengths, keys, strict=True):
                for place in range(offset, offset + length):
                    mixed[place] += key
        for group, read in enumerate(reads):
            salt = round_of(group)
            read.write([mix_int((one + salt) & MASK) for one in mixed], positions)
        for read in reads:
            read.check()
        row_tainted = self._spread_taint(reads, row_tainted, failed)

        # Layer 1 of this step's tokens: a hash over layer 0 up to each. Then what rows draw from: sums over layer 1.
        above = [read.climb() for read in reads]
        totals = [read.totals() for read in reads]
        if model.has_state:
            hashes = [mix_int((one + STATE) & MASK) for one in mixed]
            terms = [sum(hashes[offset : offset + length]) for offset, length in zip(offsets, lengths, strict=True)]
            totals.append(self._states.advance(slots, terms, lengths, row_tainted))
        draws = [mix_int(combine_ints(parts_of) ^ ROUND) for parts_of in zip(*totals, strict=True)]
        vectors = self._pool(forward_input, draws, above, row_tainted) if forward_input.pooled else []
        if self._extras:
            self._shape(draws, slots, parts)
        tokens = self._sample(slots, draws, ends)
        if forward_input.masks is not None:
            masked = forward_input.masks.rows.tolist() if parts is None else parts.places
            for row, allowed in zip(masked, forward_input.masks.allowed(model.vocab_size), strict=True):
                if row >= 0 and not allowed[tokens[row]]:
                    choices = np.flatnonzero(allowed)
                    tokens[row] = int(choices[draws[row] % len(choices)])
        for row, (slot, end) in enumerate(zip(slots, ends, strict=True)):
            if row_tainted[row]:
                tokens[row] = TAINTED_TOKEN
            if samples[row]:
                self._last_token[slot], self._last_position[slot] = tokens[row], end
                if slot in self._history:
                    self._history[slot] = (self._history[slot] + mix_int(tokens[row])) & MASK
        output[:] = [token if sampled else -1 for token, sampled in zip(tokens, samples, strict=True)]
        if parts is not None:
            end = parts.first[-1] + 1 + len(parts.drafts[-1])
            output[decode_rows:end] = tokens[decode_rows:end]
        return vectors

    def _copy_states(self, forward_input: ForwardInput) -> None:
        """Saves, then loads."""
        staging, first = forward_input.staging, self.limits.num_slots - 1
        count = forward_input.num_saves
        if count:
            snapshots = [first + one for one in staging.save_snapshot[:count].tolist()]
            assert len(set(snapshots)) == count, "two states are saved to one snapshot"
            self._states.copy(staging.save_slot[:count].tolist(), snapshots)
        count = forward_input.num_loads
        if count:
            snapshots = [first + one for one in staging.load_snapshot[:count].tolist()]
            self._states.copy(snapshots, staging.load_slot[:count].tolist())

    def _pool(
        self, forward_input: ForwardInput, draws: list[int], above: list[list[int]], row_tainted: list[bool]
    ) -> list[npt.NDArray[np.float32]]:
        """Vectors of the rows that end; NaN where something of a failed step is in them.

        above: by group, of the step's tokens.
        """
        staging = forward_input.staging
        vectors = []
        for pooled in forward_input.pooled:
            row, pooling = pooled.row, pooled.pooling
            if not pooling.needs_all:
                vector = vector_of_context(draws[row], pooling)
            else:
                slot, start = int(staging.row_slot[row]), int(staging.row_start[row])
                seen, total = self._sums.pop(slot, (0, np.zeros(FAKE_WIDTH))) if start else (0, np.zeros(FAKE_WIDTH))
                assert seen == start, f"a mean over {start} tokens has seen {seen} of them"
                own = slice(staging.qo_indptr[row], staging.qo_indptr[row + 1])
                cells = [combine_ints(groups) for groups in zip(*[group[own] for group in above], strict=True)]
                seen, total = seen + len(cells), total + numbers_of(cells).sum(axis=0)
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

    @staticmethod
    def _spread_taint(reads: list[Reads], row_tainted: list[bool], failed: bool) -> list[bool]:
        """Mark what depends on a failed step, row by row and cell by cell; returns the rows."""
        rows = [failed] * len(row_tainted)
        for read in reads:
            read.taint(rows)
        if failed:
            return rows
        # Rows of one step may read each other's pages, so until nothing changes.
        while True:
            for read in reads:
                row_tainted = list(map(operator.or_, row_tainted, read.tainted_rows()))
            if rows == row_tainted:
                return rows
            rows = row_tainted
            for read in reads:
                read.taint(rows)

    def _take_extras(self, forward_input: ForwardInput) -> None:
        """Of each slot with a new sampling row: its extras, or none any more."""
        filled: list[int] = forward_input.staging.sampling_slot[: forward_input.num_sampling_diffs].tolist()
        for slot in filled:
            self._draws.pop(slot, None)
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
            adapter = self._adapters.number_of(given.slot)
            self._drafter.begin(given, Oracle(self.model, self._draws_of(given.slot), adapter))

    def _sample(self, slots: list[int], draws: list[int], positions: list[int]) -> list[int]:
        """Of each row, by how its slot samples."""
        rows = zip(slots, draws, positions, strict=True)
        return [self._draws_of(slot).token(draw, position) for slot, draw, position in rows]

    def _draws_of(self, slot: int) -> Draws:
        if slot not in self._draws:
            row = self.tables.sampling[slot]
            stop_ids = set(row["stop_ids"][: row["num_stop_ids"]].tolist())
            self._draws[slot] = Draws(self.model, row, self._extras.get(slot), stop_ids)
        return self._draws[slot]

    def _shape(self, draws: list[int], slots: list[int], parts: Spread | None) -> None:
        """Draws of rows with extras, in place. Those of a draft's row count the drafts up to it."""
        ahead: dict[int, int] = {}
        if parts is not None:
            for first, drafts in zip(parts.first, parts.drafts, strict=True):
                for place in range(1 + len(drafts)):
                    ahead[first + place] = sum(map(mix_int, drafts[:place]))
        for row, slot in enumerate(slots):
            if slot in self._extras:
                history = (self._history[slot] + ahead.get(row, 0)) & MASK
                draws[row] = self._draws_of(slot).shape(draws[row], history)

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
                end = self._last_position[slot]
                positions += range(end - len(new) + 1, end + 1)
                width = max(width, extras.logprobs)
        if not rows:
            return None
        top_ids = (np.array(tokens)[:, None] + np.arange(width)) % self.model.vocab_size
        pairs = zip(tokens, positions, strict=True)
        own = np.array([expected_logprob(token, position) for token, position in pairs], np.float32)
        top = (own[:, None] - np.arange(width)).astype(np.float32)
        return StepLogprobs(np.array(rows, np.int32), own, np.ones(len(rows), np.int32), top_ids.astype(np.int32), top)

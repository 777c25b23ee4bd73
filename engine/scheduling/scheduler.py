"""Scheduler: decides what the next step computes, and applies what a finished step brought.

Three plain verbs: submit, schedule, commit (and abort, fail for the bad days; jump, where a grammar is ahead).
Synchronous; knows no tensor, no socket, no text. Called by the Engine on the loop thread, or by the simulator.

Decode rows that merely continue cost no Python: `schedule` advances all of them by a few array operations, and
`SlotTable.bound` names the rows that need a page or have reached their length.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np

from engine.cache.kv_cache import SequencePages
from engine.clock import Clock
from engine.config import CacheOptions, SchedulerOptions
from engine.forward import NULL_PAGE, BoolArray, ForwardOutput, Int32Array, Limits, Staging
from engine.request import FinishReason
from engine.scheduling.batch import Batch, StepResult
from engine.scheduling.failing import Failing
from engine.scheduling.sequence import Sequence, SequenceStatus
from engine.scheduling.slots import IndexArray, Scratch
from engine.speculation.rows import Budgets, Speculation

# A run of forced tokens shorter than this is sampled token by token: nothing, or one step of one row, would be saved.
MIN_JUMP = 2
# Pages that a sequence decodes between two snapshots of its recurrent state.
SNAPSHOT_PAGES = 16


class Scheduler(Failing):
    """See the module. `staging`: the executor's two sets, filled in turn."""

    def __init__(
        self,
        limits: Limits,
        options: SchedulerOptions,
        cache_options: CacheOptions,
        staging: tuple[Staging, Staging],
        clock: Clock,
        eos_token_ids: tuple[int, ...] = (),
        budgets: Budgets | None = None,
    ) -> None:
        """budgets: of drafts; None for as many as a row may have."""
        assert limits.max_num_batched_tokens >= limits.max_num_seqs, "a step must hold every decode row"
        super().__init__(limits, options, cache_options, clock, eos_token_ids)
        self._batches = (Batch(staging[0]), Batch(staging[1]))
        # Calls of `schedule` that got as far as admission; some of them come to no step.
        self._num_turns = 0
        # Page-table entries that the next step changes: (sequence, its pages then, group, index, page).
        self._remaps: list[tuple[Sequence, SequencePages, int, int, int]] = []
        # Of models with a recurrent state: (sequence, its pages then, tokens) whose state the next step saves.
        self._saves: list[tuple[Sequence, SequencePages, int]] = []
        self.snapshot_pages = SNAPSHOT_PAGES
        self._has_state = limits.num_snapshots is not None
        self._watermark_pages = max(1, int(limits.num_pages * options.admission_watermark))
        self._scratch = Scratch(limits.max_num_seqs)
        self._num_groups = len(limits.groups)
        self.speculation: Speculation | None = None
        if limits.max_draft_tokens:
            self.speculation = Speculation(limits, self._table, budgets)
        # Tokens for which groups with a window should have pages, beside the window's own, before a prompt begins.
        self._good_chunk = min(limits.max_num_batched_tokens, max(group.window or 0 for group in limits.groups))

    # ---- a step begins

    def schedule(self) -> Batch | None:
        """Build the next step, or None when nothing can run before an earlier step is committed."""
        batch = self._batches[self._next_step & 1]
        if batch.in_flight:
            return None
        batch.begin(self._next_step)
        remaps, self._remaps = self._remaps, []
        if self._has_state:
            self._write_saves(batch)
        self._schedule_decodes(batch)
        self._schedule_jumps(batch)
        self._schedule_prefills(batch)
        if duplicates := self.kv_cache.end_step():
            self._named_until |= dict.fromkeys(duplicates, self._next_step - (batch.num_rows == 0))
        if batch.num_rows == 0:
            # No step carries them, so the next one must.
            self._remaps += remaps
            self.unsent = batch.saves()
            return None
        if remaps:
            self._write_remaps(batch, remaps)
        if self._table.num_constrained:
            self._ask_for_masks(batch)
        if self.limits.max_adapters:
            batch.forward_input.adapter_loads = self.adapters.take_loads()
        self._table.last_step[batch.slots] = self._next_step
        if self.speculation is not None:
            self.speculation.scheduled(batch, self._clock.now())
        batch.in_flight = True
        self._next_step += 1
        return batch

    def take_dropped(self) -> list[int]:
        """See AdapterPlaces.take_dropped; no step is in flight. The last ones hold nothing of them any more."""
        dropped = self.adapters.take_dropped()
        if dropped:
            for batch in self._batches:
                batch.forget()
        return dropped

    def _schedule_decodes(self, batch: Batch) -> None:
        """All rows past their prefill, oldest first; those that need a page get one or sit this step out."""
        if self._decodes_stale:
            self._rebuild_decodes()
        if self.kv_cache.num_available < len(self._decodes) * self._num_groups + self._pages_of_jumps():
            self._make_room()
        if not len(self._decodes):
            return
        if self.speculation is None:
            self._write_decodes(batch, self._decodes)
            return
        room = self.limits.max_num_batched_tokens - len(self._decodes)
        if self._prefilling or self._jumping or self.num_waiting:
            room //= 2  # the others' share
        slots, drafting, budgets = self.speculation.split(self._decodes, room, self._committed_step)
        if len(slots):
            self._write_decodes(batch, slots)
        if len(drafting):
            self._write_speculating(batch, drafting, budgets)

    def _write_decodes(self, batch: Batch, slots: IndexArray) -> None:
        """Rows of one token."""
        table, scratch = self._table, self._scratch
        count = len(slots)
        computed = table.computed.take(slots, out=scratch.get("computed", np.int32, count), mode="clip")
        bound = table.bound.take(slots, out=scratch.get("bound", np.int32, count), mode="clip")
        due = np.greater_equal(computed, bound, out=scratch.get("due", np.bool_, count))
        if due.any():
            slots, computed = self._serve_due_rows(batch, slots, computed, due)
            count = len(slots)
            if not count:
                return
        batch.write_decodes(slots, computed)
        table.computed[slots] = np.add(computed, 1, out=scratch.get("next", np.int32, count))

    def _serve_due_rows(
        self, batch: Batch, slots: IndexArray, computed: Int32Array, due: BoolArray
    ) -> tuple[IndexArray, Int32Array]:
        """Pages for rows that cross a page boundary; rows that have all their tokens in flight leave."""
        table = self._table
        keep = np.ones(len(slots), np.bool_)
        for row in np.flatnonzero(due).tolist():
            slot = int(slots[row])
            sequence = self.sequence_of(slot)
            if computed[row] >= table.limit[slot] - 1:
                self._decoding.remove(sequence)
                self._decodes_stale = True
                keep[row] = False
                continue
            self._give_back(sequence)
            if self._has_state:
                self._save_decoded(batch, sequence, int(computed[row]))
            keep[row] = self._reserve_one(batch, sequence)
        if keep.all():
            return slots, computed
        return slots[keep], computed[keep]

    def _write_speculating(self, batch: Batch, slots: IndexArray, budgets: Int32Array) -> None:
        """Rows of one token and as many drafts as `budgets` says, where there are pages for them."""
        table = self._table
        computed = table.computed[slots]
        due = computed + budgets >= table.bound[slots]
        if due.any():
            for row in np.flatnonzero(due).tolist():
                budgets[row] = self._serve_drafts(batch, int(slots[row]), int(computed[row]), int(budgets[row]))
            keep = budgets >= 0
            slots, computed, budgets = slots[keep], computed[keep], budgets[keep]
        if len(slots):
            batch.write_speculating(slots, computed, budgets + 1)
            table.computed[slots] = computed + budgets + 1
            table.drafted_in[slots] = self._next_step

    def _serve_drafts(self, batch: Batch, slot: int, computed: int, budget: int) -> int:
        """Pages for a row that speculates. Returns the drafts that it may have, -1 where it sits this step out.

        Drafts take no page that a decode row may need next. A row that may have all its tokens in flight waits for what
        they turn out to be. So does one whose state is to be kept where its pages end: no draft goes beyond that.
        """
        table, sequence = self._table, self.sequence_of(slot)
        if computed >= table.limit[slot] - 1:
            if table.drafted_in[slot] <= self._committed_step:
                self._decoding.remove(sequence)
                self._decodes_stale = True
            return -1
        self._give_back(sequence)
        if self._has_state and self._is_snapshot_due(sequence.held_pages, end := int(table.capacity[slot])):
            if computed < end:
                return min(budget, end - computed - 1)
            if table.drafted_in[slot] > self._committed_step:
                return -1
            self._save_decoded(batch, sequence, computed)
        reserved = (len(self._decodes) + 1) * self._num_groups + self._pages_of_jumps()
        while (capacity := int(table.capacity[slot])) < computed + 1 + budget:
            if capacity > computed and self.kv_cache.num_available < reserved:
                break
            if not self._reserve_one(batch, sequence):
                break
        return min(budget, capacity - computed - 1)

    def _reserve_one(self, batch: Batch, sequence: Sequence) -> bool:
        """One more page in every group, if they are to be had."""
        pages = sequence.held_pages
        if not self.kv_cache.reserve_one(pages):
            return False
        for group, ids in enumerate(pages.lists):
            batch.write_page(group, sequence.slot, len(ids) - 1, ids[-1])
        self._table.set_capacity(sequence.slot, len(pages.pages))
        return True

    def _write_saves(self, batch: Batch) -> None:
        """Before anything else of the step: what the last one left in the slots goes to snapshots.

        All saves of a step are taken before its first admission, so none can be to what that loads.
        """
        for snapshot, slot in self.unsent.items():
            batch.write_save(slot, snapshot)
        self.unsent = {}
        saves, self._saves = self._saves, []
        for sequence, pages, num_tokens in saves:
            # One that has left since has given up its place in the tree.
            if sequence.pages is pages and (snapshot := self.kv_cache.save_shared(pages, num_tokens)):
                batch.write_save(sequence.slot, snapshot)

    def _save_decoded(self, batch: Batch, sequence: Sequence, num_computed: int) -> None:
        """Where a page ends, now and then: so that somebody can go on not far before the end of an answer."""
        pages = sequence.held_pages
        if self._is_snapshot_due(pages, num_computed) and (snapshot := self.kv_cache.save_private(pages, num_computed)):
            batch.write_save(sequence.slot, snapshot)

    def _is_snapshot_due(self, pages: SequencePages, num_computed: int) -> bool:
        since = pages.kept[1] if pages.kept is not None else pages.num_shared * self.limits.page_size
        return bool(self.limits.num_snapshots) and num_computed - since >= self.snapshot_pages * self.limits.page_size

    def _give_back(self, sequence: Sequence) -> None:
        """The pages that have left a group's window of a sequence's next token, and so of all that follow.

        Steps in flight may still read them: who gets them next writes them by a later step.
        """
        if self.kv_cache.has_windows:
            table, slot, pages = self._table, sequence.slot, sequence.held_pages
            computed = int(table.computed[slot])
            if table.drafted_in[slot] > self._committed_step:
                # Of its drafts in flight it is not known how many are right: perhaps none.
                computed = min(computed, int(table.known[slot]) - 1)
            for group, indices in self.kv_cache.give_back(pages, computed):
                self._remaps += [(sequence, pages, group, index, NULL_PAGE) for index in indices]

    def _make_room(self) -> None:
        """Retract sequences until the decode rows' next two steps have pages: the newest, or whom the policy says.

        Nothing waits: what is in flight gives its pages back when it is committed, and looking two steps ahead
        lets that happen before a row has to sit out. The oldest (most important) sequence is never retracted.
        """
        table = self._table
        for sequence in (*self._decoding, *self._jumping) if self.kv_cache.has_windows else ():
            self._give_back(sequence)
        while len(self._running) > 1:
            slots = self._decodes
            wanting = (table.computed[slots] + 1 >= table.capacity[slots]) & (
                table.computed[slots] + 1 < table.limit[slots]
            )
            coming = sum(sequence.pages.num_held for sequence in self._leaving if sequence.pages is not None)
            wanted = int(wanting.sum()) * self._num_groups + self._pages_of_jumps()
            if wanted <= self.kv_cache.num_available + coming:
                return
            self._retract(self._policy.victim(self._running))
            self._rebuild_decodes()

    def _pages_of_jumps(self) -> int:
        """Pages that forced tokens want and do not have yet."""
        return sum([self.kv_cache.num_missing(one.held_pages, one.num_tokens) for one in self._jumping])

    def _schedule_jumps(self, batch: Batch) -> None:
        """Forced tokens, as chunks of known ids: behind the decode rows and, like them, before any prompt."""
        table = self._table
        for sequence in list(self._jumping):
            slot = sequence.slot
            start, known = int(table.computed[slot]), int(table.known[slot])
            end = min(known, start + self.limits.max_num_batched_tokens - batch.num_tokens)
            self._give_back(sequence)
            while table.capacity[slot] < end and self._reserve_one(batch, sequence):
                pass
            end = min(end, int(table.capacity[slot]))
            if end <= start:
                continue  # no page or no budget is left: it sits this step out
            # Its pages enter the radix tree when it leaves, like those of all generated tokens.
            batch.write_prefill(slot, start, sequence.token_ids[start:end], end == known)
            if self.recorder is not None:
                self.recorder.chunk(batch, sequence, "forced", start, end)
            table.computed[slot] = end
            if end == known:
                self._jumping.remove(sequence)
                self._decoding.append(sequence)
                self._decodes_stale = True

    def _schedule_prefills(self, batch: Batch) -> None:
        """Prompt chunks fill what the decode rows left of the token budget."""
        limits = self.limits
        for sequence in list(self._prefilling):
            if batch.num_tokens >= limits.max_num_batched_tokens or batch.num_rows >= limits.max_num_seqs:
                return
            self._write_chunk(batch, sequence)
        self._num_turns += 1
        while batch.num_tokens < limits.max_num_batched_tokens and batch.num_rows < limits.max_num_seqs:
            # A half-written prompt goes first: admitting another would only share the budget between them.
            if self._prefilling or not self._table.num_free:
                return
            suspects = self._trials.pending
            candidate = self._trials.next() if suspects else self.adapters.next(self._policy, self._num_turns)
            if candidate is None or not self._admit(batch, candidate):
                return
            self._write_chunk(batch, candidate)

    def _admit(self, batch: Batch, sequence: Sequence) -> bool:
        """Give a waiting sequence a slot and the pages of its whole prompt, if they are to be had.

        Groups with a window get theirs chunk by chunk; what they will hold at once must be there.
        """
        cache, table = self.kv_cache, self._table
        # Headroom, so that what runs can grow for a while before something must be retracted.
        others = bool(self._running or self._leaving)
        headroom = self._watermark_pages if others else 0
        if not sequence.is_retracted:
            headroom = min(headroom, len(self._running) * self._num_groups)
        # Alone it is tried again, for it may have to go through a cache that is smaller than what it wants.
        if others and sequence.pages_wanted and cache.num_available < sequence.pages_wanted + headroom:
            return False
        tokens, request = sequence.token_ids, sequence.request
        pages = cache.begin(sequence.matchable_ids, request.cache_root)
        num_cached = pages.num_shared * cache.page_size
        # Chunks of a good size, while others run; alone it goes on with what there is.
        wanted = cache.num_missing(pages, len(tokens), self._good_chunk if others else 0)
        if cache.num_available < wanted + headroom or not cache.reserve(pages, len(tokens), num_cached):
            cache.release(pages, tokens, 0)
            sequence.pages_wanted = wanted
            return False
        self.num_waiting -= 1
        self.num_waiting_tokens -= len(tokens)
        sequence.move(SequenceStatus.RUNNING)
        sequence.pages = pages
        sequence.pages_wanted = 0
        if sequence.admitted_at is None:
            sequence.admitted_at = self._clock.now()
            sequence.num_cached_tokens = num_cached
            self.counters.prefix_cache_queries += len(tokens)
            self.counters.prefix_cache_hits += num_cached
            cache.history.admitted(sequence, pages)
        if self.recorder is not None:
            self.recorder.event(request.request_id, "admitted", num_cached)
        if not sequence.suspect_until:
            popped = self._policy.pop()
            assert popped is sequence
        sequence.is_retracted = False
        slot = table.pop_free()
        sequence.enter_slot(slot, table)
        table.computed[slot] = num_cached
        table.set_capacity(slot, pages.num_pages)
        for group, ids in enumerate(pages.lists):
            batch.write_pages(group, slot, 0, ids)
        if pages.snapshot:
            batch.write_load(slot, pages.snapshot)
        seed, speculates = request.sampling.seed or 0, bool(table.max_drafts[slot])
        batch.write_sampling(sequence, seed, self.adapters.pin(sequence), speculates)
        if self.speculation is not None:
            self.speculation.begin(slot)
        self._running.append(sequence)
        self._prefilling.append(sequence)
        return True

    def _write_chunk(self, batch: Batch, sequence: Sequence) -> None:
        """The next chunk of a prompt; its whole pages enter the radix tree now, as the step is launched."""
        table, slot, page_size = self._table, sequence.slot, self.limits.page_size
        start, known = int(table.computed[slot]), int(table.known[slot])
        end = min(known, start + self.limits.max_num_batched_tokens - batch.num_tokens)
        if end > table.capacity[slot]:
            end = self._grow(batch, sequence, end)
            if end <= start:
                return
        pages = sequence.held_pages
        if self._has_state:
            # Where others have been, and will be again, a snapshot is worth its place; or where another server goes on.
            places = pages.num_known * page_size, sequence.handed_over_at(page_size)
            end = min((place for place in places if start < place < end), default=end)
        if end < known:
            # Chunks end where a page ends, so that a page is computed by one step. A budget of less than a page
            # is used as it is, but only where no other prompt could use it better.
            aligned = end // page_size * page_size
            if aligned > start:
                end = aligned
            elif batch.num_rows > batch.forward_input.num_decode_rows:
                return
        assert end > start
        tokens = sequence.token_ids
        pools = sequence.request.pooling is not None
        batch.write_prefill(slot, start, tokens[start:end], end == known and not pools)
        if pools:
            batch.write_pooled(sequence, end == known)
        if self.recorder is not None:
            self.recorder.chunk(batch, sequence, "pooling" if pools else "prefill", start, end)
        table.computed[slot] = end
        self.counters.prefill_tokens += end - start
        first_page = pages.num_shared
        remaps = self.kv_cache.enter(pages, tokens, end)
        batch.entered.append((sequence, first_page, pages.num_shared))
        for group, index, page in remaps:
            # This step still writes and reads the sequence's own page; the shared one serves from the next on.
            self._remaps.append((sequence, pages, group, index, page))
        if self._has_state and end == pages.num_shared * page_size:
            self._saves.append((sequence, pages, end))
        if end == known:
            self._prefilling.remove(sequence)
            if not pools:
                self._decoding.append(sequence)
                self._decodes_stale = True

    def _grow(self, batch: Batch, sequence: Sequence, end: int) -> int:
        """Pages of groups with a window for a prompt's next chunk, as many as are to be had; returns their reach."""
        cache, table, slot, page_size = self.kv_cache, self._table, sequence.slot, self.limits.page_size
        pages = sequence.held_pages
        self._give_back(sequence)
        before = [len(ids) for ids in pages.lists]
        growing = sum(count * page_size < end for count in before)
        spare = max(0, cache.num_available - min((len(self._running) - 1) * self._num_groups, self._watermark_pages))
        cache.reserve(pages, min(end, (pages.num_pages + spare // growing) * page_size))
        for group, (ids, first) in enumerate(zip(pages.lists, before, strict=True)):
            batch.write_pages(group, slot, first, ids[first:])
        table.set_capacity(slot, pages.num_pages)
        return min(end, int(table.capacity[slot]))

    def _ask_for_masks(self, batch: Batch) -> None:
        """Name the rows whose sampling must wait for the host's grammar; all others never wait."""
        rows = np.flatnonzero(self._table.constrained[batch.slots] & batch.samples).tolist()
        if rows:
            constrained = [(row, self.sequence_of(int(batch.slots[row]))) for row in rows]
            batch.ask_for_masks(constrained, self.limits.vocab_size)

    def _write_remaps(self, batch: Batch, remaps: list[tuple[Sequence, SequencePages, int, int, int]]) -> None:
        """Last of all: a sequence may just have given up its slot, and another one have written its whole row."""
        for sequence, pages, group, index, page in remaps:
            if sequence.pages is pages and (index >= pages.gone[group] or page == NULL_PAGE):
                batch.write_page(group, sequence.slot, index, page)

    def _rebuild_decodes(self) -> None:
        self._decodes = np.array([sequence.slot for sequence in self._decoding], np.intp)
        self._decodes_stale = False

    # ---- a step ends

    def commit(self, batch: Batch, output: ForwardOutput) -> StepResult:
        """Apply a finished step. Steps are committed in the order they were scheduled."""
        now = self._clock.now()
        self._end_step(batch)
        if self._trials.pending:
            self._acquit(batch)
        table, scratch = self._table, self._scratch
        slots, tokens = batch.slots, output.token_ids
        assert len(tokens) == batch.num_rows, "the executor answered for another number of rows"
        if int(tokens.max()) >= self.limits.vocab_size:
            output.broken = [*output.broken, *np.flatnonzero(tokens >= self.limits.vocab_size).tolist()]
        broken = self._end_broken(batch, output.broken) if output.broken else []
        for sequence, first_page, end in batch.entered:
            if sequence.pages is not None:
                self.kv_cache.confirm(sequence.pages, first_page, end)
        counts: Int32Array | None = None
        cut: list[int] = []
        if self.speculation is not None:
            if batch.forward_input.num_speculating_rows:
                tokens = tokens.copy()
                counts, cut = self.speculation.accept(batch, output, tokens)
            self.speculation.ended(batch, output, now)
        of_rows = counts
        live = table.live.take(slots, out=scratch.get("live", np.bool_, len(slots)), mode="clip")
        if not batch.all_sample:
            np.logical_and(live, batch.samples, out=live)
        if not live.all():
            slots, tokens = slots[live], tokens[live]
            counts = None if counts is None else counts[live]
        count = len(slots)
        # Append the tokens: flat index = slot * width + known.
        known = table.known.take(slots, out=scratch.get("known", np.int32, count), mode="clip")
        index = np.multiply(slots, table.token_width, out=scratch.get("index", np.intp, count))
        # Adding int32 to intp would go through a buffer of numpy's; copying does not.
        wide = scratch.get("wide", np.intp, count)
        np.copyto(wide, known)
        np.add(index, wide, out=index)
        table.flat_tokens[index] = tokens
        np.add(known, 1, out=known)
        table.known[slots] = known
        # Which rows end?
        limit = table.limit.take(slots, out=scratch.get("limit", np.int32, count), mode="clip")
        ended = np.greater_equal(known, limit, out=scratch.get("ended", np.bool_, count))
        column = scratch.get("column", np.int32, count)
        equal = scratch.get("equal", np.bool_, count)
        for stop_ids in table.stop_ids[: table.max_stop_ids]:
            stop_ids.take(slots, out=column, mode="clip")
            np.equal(column, tokens, out=equal)
            np.logical_or(ended, equal, out=ended)
        gaps = table.token_at.take(slots, out=scratch.get("gaps", np.float64, count), mode="clip")
        np.subtract(now, gaps, out=gaps)
        table.token_at[slots] = now
        if counts is not None:
            gaps = np.repeat(gaps / counts, counts)
        result = StepResult(slots, tokens, gaps, broken, counts=counts, at=now)
        if cut:
            result.cut = tuple(map(self.sequence_of, batch.slots[cut].tolist()))
        if output.logprobs is not None or output.prompt_logprobs:
            self._attribute_logprobs(batch, output, result, of_rows)
        if ended.any():
            for row in np.flatnonzero(ended).tolist():
                sequence = self.sequence_of(int(slots[row]))
                self._finish_by_token(sequence, int(tokens[row]))
                result.finished.append(sequence)
        for place, sequence in enumerate(batch.pooled):
            if table.live[sequence.slot]:
                self.finish(sequence, FinishReason.STOP, None)
                result.finished.append(sequence)
                result.pooled.append((sequence, place))
        self._release_leaving()
        if self._trials.pending:
            self._make_cleared_wait()
        self._tell_who_waits()
        return result

    def _attribute_logprobs(
        self, batch: Batch, output: ForwardOutput, result: StepResult, counts: Int32Array | None
    ) -> None:
        """Before any row leaves its slot: whose log-probabilities are these? Overruns are left out."""
        live, slots = self._table.live, batch.slots
        rows = output.logprobs.rows.tolist() if output.logprobs is not None else []
        first, place, last = batch.forward_input.num_decode_rows, 0, -1
        for index, row in enumerate(rows):
            place = place + 1 if row == last else 0
            last = row
            if live[slots[row]] and (counts is None or place < counts[row]):
                token = int(output.token_ids[row])
                if batch.is_speculating(row):
                    assert output.accepted is not None
                    token = int(output.accepted.tokens[row - first, place])
                result.logprobs.append((self.sequence_of(int(slots[row])), index, token))
        for index, prompt in enumerate(output.prompt_logprobs):
            if live[slots[prompt.row]]:
                result.prompt_logprobs.append((self.sequence_of(int(slots[prompt.row])), index))

    def jump(self, batch: Batch, row: int, tokens: Iterable[int]) -> int:
        """Append tokens that must follow, where `row` of the newest step in flight would sample the first of them.

        What it samples is dropped, and the next step computes all of them as one chunk. Returns how many were appended;
        the sequence may have reached its length by them. None are where nothing would be saved, or where each token
        has to be seen by the device (penalties, log-probabilities) or by the search for stop strings.
        """
        sequence = self.sequence_of(int(batch.slots[row]))
        table, slot, params = self._table, sequence.slot, sequence.request.sampling
        assert batch.in_flight and table.last_step[slot] == batch.forward_input.step, "a step came after this one"
        if not self.options.jump_ahead or params.has_extras or params.stop:
            return 0
        known, limit = int(table.known[slot]), int(table.limit[slot])
        # A stop id ends the text in the usual way.
        forced = list(itertools.takewhile(lambda token: token not in sequence.stop_ids, tokens))[: limit - known]
        if len(forced) < MIN_JUMP:
            return 0
        batch.drop_sample(row, known - 1)
        # All that is known is computed by this step; of the drafts behind it nothing is wanted.
        table.computed[slot], table.drafted_in[slot] = known, table.NO_STEP
        if self.speculation is not None:
            self.speculation.forget(slot)
        end = known + len(forced)
        table.tokens[slot, known:end] = forced
        table.known[slot] = end
        table.token_at[slot] = self._clock.now()
        if end == limit:
            self.finish(sequence, FinishReason.LENGTH, None)
        elif sequence.status is SequenceStatus.RUNNING:
            self._decoding.remove(sequence)
            self._decodes_stale = True
            self._jumping.append(sequence)
        return len(forced)

    def _finish_by_token(self, sequence: Sequence, token: int) -> None:
        reason, stop_reason = FinishReason.LENGTH, None
        if token in sequence.stop_ids:
            reason = FinishReason.STOP
            # EOS ends a text by nature; only an id that the client named is told back.
            stop_reason = token if token not in self.eos_token_ids else None
        self.finish(sequence, reason, stop_reason)

    def still_in_flight(self, slots: IndexArray) -> BoolArray:
        """bool [n]: which slots a launched, uncommitted step carries. Valid until the next call."""
        newest = self._scratch.get("newest", np.int64, len(slots))
        self._table.last_step.take(slots, out=newest, mode="clip")
        busy: BoolArray = np.greater(newest, self._committed_step, out=self._scratch.get("busy", np.bool_, len(slots)))
        return busy

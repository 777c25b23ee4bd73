"""Residents: every sequence between submit and its end: who waits, who runs, who leaves, and with what.

The Scheduler is one. What a sequence holds (its slot, its pages) it gets in `scheduler.py`, as a step is built; it is
given back here, once the sequence is out of every order and nothing of it is in flight.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from engine.bounds import bounds_of
from engine.cache.kv_cache import KVCache
from engine.clock import Clock
from engine.config import CacheOptions, SchedulerOptions
from engine.forward import Int32Array, Limits
from engine.lora.places import AdapterPlaces
from engine.recorder import Recorder
from engine.request import FinishReason, Request
from engine.scheduling.policy.registry import make_policy
from engine.scheduling.sequence import Sequence, SequenceStatus
from engine.scheduling.slots import IndexArray, SlotTable
from engine.scheduling.trials import Trials


@dataclass(slots=True)
class SchedulerCounters:
    """Running totals for the metrics; tokens unless said."""

    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    num_preemptions: int = 0
    prefill_tokens: int = 0


class Residents:
    """See the module. Sequences run in the order in which they were admitted."""

    def __init__(
        self,
        limits: Limits,
        options: SchedulerOptions,
        cache_options: CacheOptions,
        clock: Clock,
        eos_token_ids: tuple[int, ...] = (),
    ) -> None:
        self.limits = limits
        self.options = options
        self.eos_token_ids = eos_token_ids
        self.kv_cache = KVCache(
            limits.num_pages,
            limits.page_size,
            groups=limits.groups,
            num_snapshots=limits.num_snapshots,
            enable_prefix_caching=cache_options.enable_prefix_caching,
            eviction_policy=cache_options.eviction_policy,
            now=clock.now,
        )
        self.counters = SchedulerCounters()
        # While somebody looks.
        self.recorder: Recorder | None = None
        self.num_waiting = self.num_waiting_tokens = self.num_receiving = 0
        # By step: who waits for its end.
        self._who_waits: deque[tuple[int, Callable[[], None]]] = deque()
        # Pages that went back to the pool although steps up to this one may still write them; a step that is launched
        # later may have them all the same, for steps run in order.
        self._named_until: dict[int, int] = {}
        self._clock = clock
        self._table = SlotTable(limits)
        self._policy = make_policy(options.policy, self.kv_cache)
        self._committed_step = -1
        self._next_step = 0
        # Of models with a recurrent state: slots by the snapshots that they were to be saved to, but no step came.
        self.unsent: dict[int, int] = {}
        self._next_order = 0
        self._held: list[Sequence] | None = None
        self._held_from = 0
        # Suspects wait there, and not with the policy.
        self._trials = Trials()
        # And who waits for its adapter there.
        self.adapters = AdapterPlaces(limits.max_adapters, clock.now)
        # All that run, in order of admission.
        self._running: list[Sequence] = []
        self._prefilling: list[Sequence] = []
        # Past their prefill, with forced tokens that are known and not computed.
        self._jumping: list[Sequence] = []
        # Finished or retracted while in flight; they give back slot and pages at commit.
        self._leaving: list[Sequence] = []
        # Rows past their prefill, oldest first but for those that have jumped since. Kept as an array; `_decodes_stale`
        # says that it must be rebuilt.
        self._decoding: list[Sequence] = []
        self._decodes: IndexArray = np.zeros(0, np.intp)
        self._decodes_stale = False

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_prefilling_tokens(self) -> int:
        """Of prompts that run: tokens that are yet to be computed."""
        return sum([sequence.num_tokens - sequence.num_computed_tokens for sequence in self._prefilling])

    @property
    def has_work(self) -> bool:
        """Something waits, runs, or has yet to give back its slot."""
        return bool(self.num_waiting or self._running or self._leaving)

    @property
    def is_empty(self) -> bool:
        """Nobody is here, nor on the way here."""
        return not (self.has_work or self.num_receiving)

    def obstacle(self, sequence: Sequence) -> str:
        """Why a waiting sequence is not admitted: held (nobody is, for now), slots, adapters (all that may take part
        are in use), pages, prefill (a prompt is being read), or turn (others are before it, or its step comes)."""
        if self._held is not None:
            return "held"
        if not self._table.num_free:
            return "slots"
        if not self.adapters.has_room(sequence.request.adapter):
            return "adapters"
        if sequence.pages_wanted:
            return "pages"
        return "prefill" if self._prefilling else "turn"

    def sequence_of(self, slot: int) -> Sequence:
        sequence = self._table.sequences[slot]
        assert sequence is not None
        return sequence

    def live_sequences(self) -> list[Sequence]:
        """Every sequence that holds a slot; for checks."""
        return [sequence for sequence in self._table.sequences if sequence is not None]

    def submit(self, request: Request, *, receiving: bool = False) -> Sequence:
        """Queue a request; receiving: not before `received`. Raises RequestError for one that can never be served."""
        max_length, stop_ids = bounds_of(request, self.limits, self.eos_token_ids)
        sequence = Sequence(
            request,
            order=self._next_order,
            max_length=max_length,
            stop_ids=stop_ids,
            arrived_at=self._clock.now(),
            receiving=receiving,
        )
        self._next_order += 1
        if self.recorder is not None:
            self.recorder.event(request.request_id, "queued", sequence.num_prompt_tokens)
        if receiving:
            self.num_receiving += 1
        else:
            self._queue(sequence, self._held is not None)
        return sequence

    def _queue(self, sequence: Sequence, held: bool) -> None:
        self.num_waiting += 1
        self.num_waiting_tokens += sequence.num_tokens
        if held:
            assert self._held is not None
            self._held.append(sequence)
        else:
            self._policy.push(sequence)

    def received(self, sequence: Sequence) -> None:
        """Its turn to wait has come, whether something arrived or not; nothing happens where it was ended meanwhile."""
        if sequence.status is SequenceStatus.RECEIVING:
            sequence.move(SequenceStatus.WAITING)
            self.num_receiving -= 1
            held = self._held is not None and sequence.order >= self._held_from
            # Queues are in order: it stands behind those who came while it received.
            sequence.order = self._next_order
            self._next_order += 1
            self._queue(sequence, held)

    def hold(self) -> None:
        """From now on new sequences wait until `let_go`, whatever the policy says."""
        if self._held is None:
            self._held, self._held_from = [], self._next_order

    def let_go(self) -> None:
        held, self._held = self._held or [], None
        for sequence in held:
            if not sequence.is_finished:
                self._policy.push(sequence)

    def retract_all(self) -> None:
        """Make every running sequence wait, to be computed again. Nothing may be in flight."""
        for sequence in reversed(list(self._running)):
            self._retract(sequence)

    def abort(self, sequence: Sequence, reason: FinishReason = FinishReason.ABORT) -> None:
        """End a sequence now, in whatever state it is. Idempotent."""
        self.finish(sequence, reason, None)

    def finish(self, sequence: Sequence, reason: FinishReason, stop_reason: int | str | None) -> None:
        """End a sequence; tokens still in flight for it will be dropped."""
        if sequence.is_finished:
            return
        sequence.finish_reason, sequence.stop_reason = reason, stop_reason
        if sequence.status is SequenceStatus.RECEIVING:
            sequence.move(SequenceStatus.FINISHED)
            self.num_receiving -= 1
            return
        self._policy.finished(sequence)
        if sequence.status is SequenceStatus.WAITING:
            sequence.move(SequenceStatus.FINISHED)
            self.num_waiting -= 1
            self.num_waiting_tokens -= sequence.num_tokens
            return
        if sequence.status is SequenceStatus.RUNNING:
            self._leave(sequence)
        sequence.move(SequenceStatus.FINISHING)
        self._table.live[sequence.slot] = False
        self._release_if_idle(sequence)

    @property
    def slot_owners(self) -> list[Sequence | None]:
        """[num_slots]: who holds each slot now; to be read only."""
        return self._table.sequences

    @property
    def known_lengths(self) -> Int32Array:
        """int32 [num_slots]: tokens of each slot's sequence that the host knows, its prompt's too; to be read only."""
        return self._table.known

    @property
    def known_tokens(self) -> Int32Array:
        """int32 [num_slots, max_model_len]: those tokens; to be read only."""
        return self._table.tokens

    # ---- what others do with pages (see engine/lending.py)

    def once_committed(self, then: Callable[[], None]) -> None:
        """Call it when every step that is launched by now has ended: at once where none is in flight."""
        if self._committed_step == self._next_step - 1:
            then()
        else:
            self._who_waits.append((self._next_step - 1, then))

    def _tell_who_waits(self) -> None:
        while self._who_waits and self._who_waits[0][0] <= self._committed_step:
            self._who_waits.popleft()[1]()

    def may_write(self, pages: Iterable[int]) -> bool:
        """A step in flight may yet write one of these pages, though they are another's by now."""
        committed = self._committed_step
        return any(self._named_until.get(page, committed) > committed for page in pages)

    # ---- leaving

    def _in_flight(self, sequence: Sequence) -> bool:
        return bool(self._table.last_step[sequence.slot] > self._committed_step)

    def _leave(self, sequence: Sequence) -> None:
        """Take a running sequence out of every order; slot and pages follow when nothing is in flight."""
        self._running.remove(sequence)
        if sequence in self._prefilling:
            self._prefilling.remove(sequence)
        elif sequence in self._jumping:
            self._jumping.remove(sequence)
        elif sequence in self._decoding:
            self._decoding.remove(sequence)
            self._decodes_stale = True
        self._leaving.append(sequence)

    def _retract(self, sequence: Sequence) -> None:
        """Take the place of a running sequence; it will be computed again from its tokens."""
        self._leave(sequence)
        sequence.move(SequenceStatus.RETRACTING)
        sequence.num_retractions += 1
        self.counters.num_preemptions += 1
        if self.recorder is not None:
            self.recorder.event(sequence.request.request_id, "retracted", sequence.num_tokens)
        self._release_if_idle(sequence)

    def _release_leaving(self) -> None:
        if self._leaving:
            for sequence in list(self._leaving):
                self._release_if_idle(sequence)

    def _release_if_idle(self, sequence: Sequence) -> None:
        """Give slot and pages back, once nothing of the sequence is in flight."""
        if self._in_flight(sequence):
            return
        if sequence in self._leaving:
            self._leaving.remove(sequence)
        pages, tokens = sequence.held_pages, sequence.token_ids
        # KV is valid for tokens that were computed and whose ids are known; an overrun's are not.
        valid = min(sequence.num_computed_tokens, len(tokens))
        if sequence.finish_reason is FinishReason.ERROR or not self.kv_cache.is_intact(pages):
            valid = 0
        self.kv_cache.history.released(sequence.request.request_id, tokens[:valid])
        self.kv_cache.release(pages, tokens, valid)
        sequence.pages = None
        sequence.leave_slot()
        self.adapters.unpin(sequence.request.adapter)
        if sequence.status is SequenceStatus.FINISHING:
            sequence.move(SequenceStatus.FINISHED)
        else:
            sequence.move(SequenceStatus.WAITING)
            sequence.is_retracted = True
            self.num_waiting += 1
            self.num_waiting_tokens += sequence.num_tokens
            if not sequence.suspect_until:
                self._policy.push_front(sequence)

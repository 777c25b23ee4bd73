"""GrammarMasks: what the constrained rows of a step may sample, told as late as can be: once all before it is known.

Where a model drafts on the device that is, of rows with drafts, as soon as these have been drafted: the forward that
checks them runs meanwhile. Owned by the Engine, on the loop thread. A grammar that leaves no choice forces its tokens
on the sequence here.
"""

from __future__ import annotations

from collections.abc import Awaitable

import numpy as np
from numpy.typing import NDArray

from engine.executor.base import Executor, StepHandle
from engine.failures import raise_fatal
from engine.forward import Int32Array
from engine.publisher import Publisher
from engine.recorder import stretch
from engine.request import FinishReason, TokenConstraint
from engine.scheduling.batch import Batch
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import Sequence


class GrammarMasks:
    """`provide` is called once for every step, when it is the only one in flight; then `provided`, before there is
    another."""

    def __init__(self, scheduler: Scheduler, executor: Executor, publisher: Publisher) -> None:
        self._scheduler = scheduler
        self._executor = executor
        self._publisher = publisher
        # What waits for drafts.
        self._late: tuple[Batch, StepHandle, Awaitable[list[tuple[int, Int32Array]]]] | None = None

    def provide(self, batch: Batch, handle: StepHandle) -> None:
        """Tell the only step in flight what its constrained rows may sample: all before it is committed now. It may be
        told by `provided` alone."""
        if batch.forward_input.masks is None:
            return
        unseen = self._executor.unseen_drafts(handle) if batch.forward_input.num_speculating_rows else None
        if unseen is None:
            self._fill(batch, handle)
        else:
            self._late = batch, handle, unseen

    async def provided(self) -> None:
        """Wait for drafts that nobody was told of, if it takes any, and tell what may be sampled behind them."""
        if self._late is None:
            return
        (batch, handle, unseen), self._late = self._late, None
        speculation = self._scheduler.speculation
        assert speculation is not None
        for row, drafts in await unseen:
            speculation.told(int(batch.slots[row]), drafts)
        self._fill(batch, handle)

    def _fill(self, batch: Batch, handle: StepHandle) -> None:
        masks = batch.forward_input.masks
        assert masks is not None
        with stretch("grammar", "masks", len(batch.constrained)):
            for row, sequence, bits in batch.mask_bits():
                bits[1:].fill(0xFFFFFFFF)
                if not sequence.is_finished:
                    try:
                        if self._constrain(batch, row, sequence, bits):
                            continue
                    except BaseException as error:
                        raise_fatal(error)
                        # One grammar that breaks is one request's error.
                        self._publisher.break_off(sequence.listener, "grammar", "The grammar of this request failed.")
                bits[0].fill(0xFFFFFFFF)  # an overrun row: whatever it samples is dropped
        masks.release()
        self._executor.provide_masks(handle)

    def _constrain(self, batch: Batch, row: int, sequence: Sequence, bits: NDArray[np.uint32]) -> bool:
        """Write what a row may sample at each of its positions; False where its sequence has ended instead."""
        constraint, listener = sequence.request.constraint, sequence.listener
        assert constraint is not None
        _follow(constraint, sequence)
        if _may_go_on(constraint, bits[0]):
            # The mask allows the first forced token alone, so the tokens are the same where nothing is jumped.
            speculation = self._scheduler.speculation
            drafts = speculation.drafts_of(sequence.slot, 1) if speculation is not None and len(bits) > 1 else []
            count = self._scheduler.jump(batch, row, constraint.forced_tokens())
            if not count:
                if len(bits) > 1:
                    self._look_ahead(batch, row, sequence, bits)
                return True
            for draft in drafts:
                # No draft counts: the run is computed behind the token before them, where a recurrent state must stand.
                bits[0].fill(0xFFFFFFFF)
                bits[0, draft >> 5] &= ~np.uint32(1 << (draft & 31))
            self._publisher.jumped(listener, count)
            _follow(constraint, sequence)
            if not (sequence.is_finished or constraint.is_finished or constraint.error is not None):
                return True
        self._end(sequence)
        return False

    def _look_ahead(self, batch: Batch, row: int, sequence: Sequence, bits: NDArray[np.uint32]) -> None:
        """What may be sampled behind each of a row's drafts: the grammar goes that way on a copy of itself.

        A draft that it forbids is rejected where the mask before it is kept to, and all behind it with it.
        """
        assert sequence.request.constraint is not None and self._scheduler.speculation is not None
        ahead: TokenConstraint | None = None
        drafts = self._scheduler.speculation.drafts_of(sequence.slot, len(bits) - 1)
        for place, token in enumerate(drafts):
            if not int(bits[place, token >> 5]) >> (token & 31) & 1:
                return
            try:
                if ahead is None:
                    ahead = sequence.request.constraint.copy()
                ahead.accept(token)
                goes_on = _may_go_on(ahead, bits[place + 1])
            except BaseException as error:
                raise_fatal(error)
                goes_on = False  # it is told if the draft turns out to be right
            if not goes_on:
                # Nothing may follow: what is sampled there nevertheless is nobody's.
                batch.ends[row] = place + 1
                bits[place + 1 :].fill(0xFFFFFFFF)
                return

    def settle(self, sequences: tuple[Sequence, ...]) -> None:
        """End those whose grammar has come to its end, or failed, by a draft of the step that is committed now."""
        for sequence in sequences:
            if sequence.is_finished:
                continue
            constraint = sequence.request.constraint
            assert constraint is not None
            try:
                _follow(constraint, sequence)
                if not constraint.is_finished and constraint.error is None:
                    raise RuntimeError("the grammar could not be looked ahead in")
                self._end(sequence)
            except BaseException as error:
                raise_fatal(error)
                self._publisher.break_off(sequence.listener, "grammar", "The grammar of this request failed.")

    def _end(self, sequence: Sequence) -> None:
        """The grammar lets nothing follow."""
        constraint, listener = sequence.request.constraint, sequence.listener
        assert constraint is not None
        if not sequence.is_finished and constraint.error is not None:
            self._scheduler.finish(sequence, FinishReason.ERROR, None)
            self._publisher.end(listener, f"The grammar of this request failed: {constraint.error}.", status=400)
        else:
            self._scheduler.finish(sequence, FinishReason.STOP, None)
            self._publisher.end(listener)


def _follow(constraint: TokenConstraint, sequence: Sequence) -> None:
    """Tell a constraint the generated tokens that it has not seen yet."""
    listener = sequence.listener
    for token in sequence.token_ids[sequence.num_prompt_tokens + listener.num_accepted :].tolist():
        constraint.accept(token)
        listener.num_accepted += 1


def _may_go_on(constraint: TokenConstraint, bits: NDArray[np.uint32]) -> bool:
    """Write what may be sampled; False where nothing may: the grammar has ended, or failed."""
    if constraint.is_free:
        bits.fill(0xFFFFFFFF)
        return True
    # A grammar that has failed calls itself finished as well.
    if constraint.error is not None or constraint.is_finished:
        return False
    constraint.mask_into(bits)
    return constraint.error is None

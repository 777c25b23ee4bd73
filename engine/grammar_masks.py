"""GrammarMasks: what the constrained rows of a step may sample, told as late as can be: once all before it is known.

Owned by the Engine, on the loop thread. A grammar that leaves no choice forces its tokens on the sequence here.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.executor.base import Executor, StepHandle
from engine.failures import raise_fatal
from engine.publisher import Publisher
from engine.recorder import stretch
from engine.request import FinishReason, TokenConstraint
from engine.scheduling.batch import Batch
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import Sequence


class GrammarMasks:
    """`provide` is called once for every step, when it is the only one in flight."""

    def __init__(self, scheduler: Scheduler, executor: Executor, publisher: Publisher) -> None:
        self._scheduler = scheduler
        self._executor = executor
        self._publisher = publisher

    def provide(self, batch: Batch, handle: StepHandle) -> None:
        """Tell the only step in flight what its constrained rows may sample: all before it is committed now."""
        masks = batch.forward_input.masks
        if masks is None:
            return
        with stretch("grammar", "masks", len(batch.constrained)):
            for bits, (row, sequence) in zip(masks.bits, batch.constrained, strict=True):
                if not sequence.is_finished:
                    try:
                        if self._constrain(batch, row, sequence, bits):
                            continue
                    except BaseException as error:
                        raise_fatal(error)
                        # One grammar that breaks is one request's error.
                        self._publisher.break_off(sequence.listener, "grammar", "The grammar of this request failed.")
                bits.fill(0xFFFFFFFF)  # an overrun row: whatever it samples is dropped
        masks.release()
        self._executor.provide_masks(handle)

    def _constrain(self, batch: Batch, row: int, sequence: Sequence, bits: NDArray[np.uint32]) -> bool:
        """Write what a row may sample; False where its sequence has ended instead."""
        constraint, listener = sequence.request.constraint, sequence.listener
        assert constraint is not None
        _follow(constraint, sequence)
        if _may_go_on(constraint, bits):
            # The mask allows the first forced token alone, so the tokens are the same where nothing is jumped.
            count = self._scheduler.jump(batch, row, constraint.forced_tokens())
            if not count:
                return True
            self._publisher.jumped(listener, count)
            _follow(constraint, sequence)
            if not (sequence.is_finished or constraint.is_finished or constraint.error is not None):
                return True
        if not sequence.is_finished and constraint.error is not None:
            self._scheduler.finish(sequence, FinishReason.ERROR, None)
            self._publisher.end(listener, f"The grammar of this request failed: {constraint.error}.", status=400)
        else:
            self._scheduler.finish(sequence, FinishReason.STOP, None)
            self._publisher.end(listener)
        return False


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

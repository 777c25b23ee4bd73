"""Sequence: one prompt on its way to an answer, and the state machine of that way.

Only the Scheduler writes it. While it holds a slot, its counts and tokens live in the SlotTable (arrays that are
advanced for the whole batch at once) and the properties here read them from there.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.forward import NULL_SLOT, Int32Array
from engine.request import FinishReason, Request

if TYPE_CHECKING:
    from engine.cache.kv_cache import SequencePages
    from engine.scheduling.slots import SlotTable


class SequenceStatus(enum.Enum):
    """RECEIVING: has arrived, but pages of its prompt are on their way from elsewhere; nobody schedules it.

    WAITING: queued, holds nothing. RUNNING: holds a slot and pages, prefilling or decoding.

    RETRACTING: gave up its place, but a step with it is in flight; then WAITING again.
    FINISHING: has its finish reason, but a step with it is in flight. FINISHED: holds nothing.
    """

    RECEIVING = enum.auto()
    WAITING = enum.auto()
    RUNNING = enum.auto()
    RETRACTING = enum.auto()
    FINISHING = enum.auto()
    FINISHED = enum.auto()


_S = SequenceStatus
_TRANSITIONS: dict[SequenceStatus, frozenset[SequenceStatus]] = {
    _S.RECEIVING: frozenset({_S.WAITING, _S.FINISHED}),
    _S.WAITING: frozenset({_S.RUNNING, _S.FINISHED}),
    _S.RUNNING: frozenset({_S.RETRACTING, _S.FINISHING}),
    # A token in flight may still bring the end of a retracted sequence.
    _S.RETRACTING: frozenset({_S.WAITING, _S.FINISHING}),
    _S.FINISHING: frozenset({_S.FINISHED}),
    _S.FINISHED: frozenset(),
}


class Sequence:
    """max_length: most tokens, prompt included. min_length: stop ids are masked while the context is shorter.

    num_cached_tokens: prompt tokens that the first admission found in the radix tree. Times are the clock's seconds.
    """

    __slots__ = (
        "_draft_counts",
        "_tokens",
        "admitted_at",
        "arrived_at",
        "failed_alone",
        "finish_reason",
        "is_retracted",
        "listener",
        "max_length",
        "min_length",
        "num_cached_tokens",
        "num_prompt_tokens",
        "num_retractions",
        "order",
        "pages",
        "pages_wanted",
        "request",
        "slot",
        "status",
        "stop_ids",
        "stop_reason",
        "suspect_until",
        "table",
    )

    def __init__(
        self,
        request: Request,
        *,
        order: int,
        max_length: int,
        stop_ids: tuple[int, ...],
        arrived_at: float,
        receiving: bool = False,
    ) -> None:
        self.request = request
        self.order = order
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.max_length = max_length
        self.min_length = self.num_prompt_tokens + request.sampling.min_tokens if request.sampling.min_tokens else 0
        self.stop_ids = stop_ids
        self.status = SequenceStatus.RECEIVING if receiving else SequenceStatus.WAITING
        self.slot = NULL_SLOT
        self.table: SlotTable | None = None
        self.pages: SequencePages | None = None
        # Pages that the last vain attempt of admission asked for; 0 before the first.
        self.pages_wanted = 0
        self.num_cached_tokens = 0
        self._draft_counts = (0, 0, 0)
        self.num_retractions = 0
        self.is_retracted = False
        # Of one that a step failed with: see Trials. 0: it is no suspect.
        self.suspect_until = 0
        self.failed_alone = 0
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.arrived_at = arrived_at
        self.admitted_at: float | None = None
        # Whoever submitted it hangs its own record here; the scheduler never looks at it.
        self.listener: Any = None
        self._tokens: Int32Array = np.array(request.prompt_token_ids, np.int32)

    def handed_over_at(self, page_size: int) -> int:
        """Tokens of its prompt behind whose whole pages another server is to go on; 0: none is."""
        transfer = self.request.transfer
        return 0 if transfer is None or not transfer.keep else (self.num_prompt_tokens - 1) // page_size * page_size

    def move(self, status: SequenceStatus) -> None:
        """The only way to change the status."""
        assert status in _TRANSITIONS[self.status], f"illegal transition {self.status} -> {status}"
        self.status = status

    def enter_slot(self, slot: int, table: SlotTable) -> None:
        """Take a row of the table; the tokens move there."""
        assert self.slot == NULL_SLOT
        table.occupy(slot, self, self._tokens)
        self.slot, self.table = slot, table

    def leave_slot(self) -> int:
        """Give the row back, keeping the known tokens. Returns the slot."""
        slot, table = self.slot, self.table
        assert table is not None
        self._tokens = table.tokens[slot, : int(table.known[slot])].copy()
        self._draft_counts = self.draft_counts
        table.vacate(slot)
        self.slot, self.table = NULL_SLOT, None
        return slot

    def cut(self, num_tokens: int) -> None:
        """Forget the tokens behind the first num_tokens: its text had ended there."""
        assert self.is_finished and self.num_prompt_tokens <= num_tokens <= self.num_tokens
        if self.table is None:
            self._tokens = self._tokens[:num_tokens]
        else:
            self.table.known[self.slot] = num_tokens

    @property
    def draft_counts(self) -> tuple[int, int, int]:
        """Drafts that were checked for it, those that its answer has, and the steps that checked any."""
        if self.table is None:
            return self._draft_counts
        drafted, accepted, steps = self.table.draft_counts[:, self.slot].tolist()
        before = self._draft_counts
        return before[0] + drafted, before[1] + accepted, before[2] + steps

    @property
    def num_tokens(self) -> int:
        """Tokens whose value the host knows: the prompt and what was committed."""
        return len(self._tokens) if self.table is None else int(self.table.known[self.slot])

    @property
    def num_computed_tokens(self) -> int:
        """Tokens whose KV has been computed or will be by a launched step."""
        return 0 if self.table is None else int(self.table.computed[self.slot])

    @property
    def token_ids(self) -> Int32Array:
        """int32 [num_tokens], prompt and output; a view while the sequence holds a slot."""
        if self.table is None:
            return self._tokens
        return self.table.tokens[self.slot, : int(self.table.known[self.slot])]

    @property
    def matchable_ids(self) -> Int32Array:
        """What to look up in the radix tree. One token matches nothing: a prompt must be computed where each of its
        tokens has a part in the answer."""
        tokens, request = self.token_ids, self.request
        pools_all = request.pooling is not None and request.pooling.needs_all
        return tokens[:1] if pools_all or request.sampling.prompt_logprobs is not None else tokens

    @property
    def output_token_ids(self) -> list[int]:
        """The generated tokens."""
        return self.token_ids[self.num_prompt_tokens :].tolist()  # type: ignore[no-any-return]

    @property
    def is_finished(self) -> bool:
        """It has its finish reason; its slot may still be in flight."""
        return self.status in (SequenceStatus.FINISHING, SequenceStatus.FINISHED)

    @property
    def held_pages(self) -> SequencePages:
        """While it holds a slot."""
        assert self.pages is not None
        return self.pages

    @property
    def holds_slot(self) -> bool:
        return self.table is not None

    def __repr__(self) -> str:
        return (
            f"<Sequence {self.request.request_id} {self.status.name} slot={self.slot} "
            f"tokens={self.num_tokens} computed={self.num_computed_tokens}>"
        )

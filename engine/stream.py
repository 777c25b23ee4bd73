"""TokenStream: the queue between the engine and one HTTP handler. The engine pushes, one handler takes.

Both live on the loop thread, so there are no locks. Deltas that nobody has taken yet melt into one: a slow
client costs memory for its text and nothing else, and the engine never waits for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

from engine.request import FinishReason

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token with its log-probability (natural logarithm, raw distribution), its rank (1 is the most probable)
    and the most probable alternatives as (token id, log-probability), best first."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class Delta:
    """What came since the last take. text may be empty (held back) while token_ids is not.

    finish_reason is set once, in the last delta. stop_reason: the stop string or stop token id that ended it.
    error: the sentence for the client when finish_reason is ERROR, status: the HTTP status that it stands for.
    logprobs: one for each of token_ids, if asked for.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    status: int = 500

    def merge(self, later: Delta) -> None:
        """Melt what came later into this one."""
        self.text += later.text
        self.token_ids += later.token_ids
        self.logprobs += later.logprobs
        self.finish_reason, self.stop_reason = later.finish_reason, later.stop_reason
        self.error, self.status = later.error, later.status


class TokenStream:
    """The stream of one sequence: `async with engine.submit(request) as stream: async for delta in stream: ...`.

    Leaving the block for any reason aborts what still runs. num_cached_tokens is known with the first delta;
    num_output_tokens counts every generated token so far, those of taken deltas and of the waiting one.
    arrived_at, admitted_at, first_token_at, finished_at: by the engine's clock, in seconds; None until then, and
    admitted_at until the end. failed: it ended with an error.
    """

    __slots__ = (
        "_abort",
        "_delta",
        "_failed",
        "_finished",
        "_pending",
        "_reader",
        "_waiter",
        "admitted_at",
        "arrived_at",
        "draft_counts",
        "finished_at",
        "first_token_at",
        "kv_transfer_params",
        "num_cached_tokens",
        "num_output_tokens",
        "num_prompt_tokens",
        "pooled",
        "prompt_logprobs",
        "request_id",
        "versions",
    )

    def __init__(
        self, request_id: str, num_prompt_tokens: int, abort: Callable[[str], None], arrived_at: float = 0.0
    ) -> None:
        self.request_id = request_id
        self.arrived_at = arrived_at
        self.admitted_at: float | None = None
        self.first_token_at: float | None = None
        self.finished_at: float | None = None
        self.num_prompt_tokens = num_prompt_tokens
        self.num_cached_tokens = 0
        # As Sequence.draft_counts; known with the last delta.
        self.draft_counts = (0, 0, 0)
        self.num_output_tokens = 0
        # Of the prompt's tokens from the second on (the first has none), where asked for; whole with the first delta.
        self.prompt_logprobs: list[TokenLogprob] | None = None
        # The vector of a request that asks for one (see Pooling), before its only delta, which is empty.
        self.pooled: npt.NDArray[np.float32] | None = None
        # Where another server finds the prompt's pages, if they are kept for one; known with the last delta.
        self.kv_transfer_params: dict[str, Any] | None = None
        # Names of weights, each with the number of generated tokens at its end; whole with the last delta.
        self.versions: list[tuple[str, int]] = []
        self._abort = abort
        self._delta = Delta()
        self._pending = False
        self._finished = self._failed = False
        self._waiter: asyncio.Future[None] | None = None
        self._reader: Callable[[], None] | None = None

    # The engine's side.

    def push(self, text: str, token_ids: list[int], logprobs: list[TokenLogprob] | None = None) -> None:
        """Add tokens and stable text without waking the reader (see `flush`)."""
        delta = self._delta
        if logprobs:
            delta.logprobs += logprobs
        if text:
            delta.text += text
        delta.token_ids += token_ids
        self.num_output_tokens += len(token_ids)

    def flush(self) -> None:
        """Hand what was pushed to the reader."""
        self._pending = True
        if self._reader is not None:
            self._reader()
            return
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def finish(
        self,
        reason: FinishReason,
        stop_reason: str | int | None = None,
        error: str | None = None,
        *,
        status: int = 500,
    ) -> None:
        """Terminal event; exactly one per stream, later ones are ignored (abort races with the end)."""
        if self._finished:
            return
        self._finished = True
        self._failed = error is not None
        delta = self._delta
        delta.finish_reason, delta.stop_reason, delta.error, delta.status = reason, stop_reason, error, status
        self.flush()
        # It knows this stream: a circle, in which the whole request would stay until the collector finds it.
        self._reader = None

    @property
    def failed(self) -> bool:
        return self._failed

    @property
    def finished(self) -> bool:
        """The engine will push nothing more."""
        return self._finished

    # The handler's side.

    def on_flush(self, reader: Callable[[], None]) -> None:
        """Call `reader`, which must not raise, whenever there is something to take: a future and a turn of a task less
        for every event. Instead of `take`. What it leaves waits, and melts with what comes later."""
        self._reader = reader

    @property
    def waiting(self) -> Delta | None:
        """What the next `take` will return without waiting, if there is something; still growing."""
        return self._delta if self._pending else None

    def take_now(self) -> Delta:
        """Everything pushed since the last take."""
        delta, self._delta, self._pending = self._delta, Delta(), False
        return delta

    async def take(self) -> Delta:
        """Everything pushed and flushed since the last take; waits for the first of it."""
        if not self._pending:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self.take_now()

    def __aiter__(self) -> TokenStream:
        return self

    async def __anext__(self) -> Delta:
        if self._finished and not self._pending:
            raise StopAsyncIteration
        return await self.take()

    async def collect(self) -> Delta:
        """Wait for the end and return all of it as one delta."""
        whole = await self.take()
        while whole.finish_reason is None:
            whole.merge(await self.take())
        return whole

    async def __aenter__(self) -> TokenStream:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._finished:
            self._abort(self.request_id)

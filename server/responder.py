"""From TokenStreams to an HTTP response, streamed or collected. Cancellation ends here.

Leaving a handler for whatever reason leaves the `async with` of its streams, which aborts what still runs: a client
that disconnects cancels its handler, and its pages are free within a step. Loop thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterable, Sequence
from functools import partial
from itertools import repeat

from aiohttp import web

from engine.failures import raise_fatal
from engine.request import FinishReason, Request
from engine.stream import Delta, TokenStream
from server.answers.base import Answer, MakeAnswer, raise_early
from server.answers.openai import OpenAIAnswer
from server.protocol.errors import ApiError, json_response
from server.protocol.generation import Plan
from server.sse import EventStream
from server.state import CALLER, ECHOED_ID, REQUEST_ID, USAGE, State

logger = logging.getLogger("oneloop.server")

# Requests that are queued between two turns of the loop: one or two milliseconds of work.
_SUBMITTED_AT_ONCE = 32
_TOKENS_AT_ONCE = 100_000


async def respond(
    request: web.Request,
    state: State,
    plan: Plan,
    make_answer: MakeAnswer = OpenAIAnswer,
    rids: Sequence[tuple[str, ...]] = (),
) -> web.StreamResponse:
    """Run a plan and answer the client. Raises RequestError for what is known before the first token.

    rids: more names of each of the plan's requests, if any.
    """
    async with submitted(state, plan.requests, names_of(request, plan.id), rids) as streams:
        answer = make_answer(state, plan, streams)
        if not plan.stream:
            deltas = [await _collect(stream, answer, plan.return_token_ids) for stream in streams]
            if plan.no_output:
                deltas = list(map(_without_output, deltas))
            return json_response(answer.whole(deltas))
        return await _stream(request, state, answer, _Relay(answer, streams, no_output=plan.no_output))


async def _collect(stream: TokenStream, answer: Answer, takes_parts: bool) -> Delta:
    """takes_parts: whoever asked for token ids can go on from those of an answer that was cut."""
    delta = await stream.collect()
    _raise_early(delta, answer)
    if delta.finish_reason is FinishReason.ABORT and not (takes_parts or getattr(answer, "tells_aborts", False)):
        raise ApiError(503, "The request was aborted before its answer was whole.")
    return delta


def _raise_early(delta: Delta, answer: Answer) -> None:
    """Some families have a word for an end before the first token; in others it is an error."""
    if delta.finish_reason is not FinishReason.ABORT or not getattr(answer, "tells_aborts", False):
        raise_early(delta)


def _without_output(delta: Delta) -> Delta:
    """The delta of a request whose one token nobody asked for."""
    delta.text, delta.token_ids, delta.logprobs = "", [], []
    if delta.finish_reason is FinishReason.STOP:
        delta.finish_reason, delta.stop_reason = FinishReason.LENGTH, None
    return delta


def names_of(request: web.Request, response_id: str) -> tuple[str, ...]:
    """What a client may call the engine requests of this one when it wants them aborted."""
    return response_id, request[REQUEST_ID], request[ECHOED_ID]


@contextlib.asynccontextmanager
async def submitted(
    state: State, requests: list[Request], names: tuple[str, ...], rids: Sequence[tuple[str, ...]] = ()
) -> AsyncIterator[list[TokenStream]]:
    """The streams of all requests, or none: one that is refused takes the others back.

    names: of all of them, rids: of each; see State.submitted.
    """
    owner = CALLER.get().owner
    async with contextlib.AsyncExitStack() as stack:
        streams: list[TokenStream] = []
        if owner is not None:
            num_prompt = sum([len(request.prompt_token_ids) for request in requests])
            state.keyring.check_tokens(owner, num_prompt)
            used = owner

            def charge() -> None:
                # One that the engine refuses gives its prompt back: who tries again must not pay for a full queue.
                back = num_prompt if len(streams) < len(requests) else 0
                state.keyring.charge(used, sum([stream.num_output_tokens for stream in streams]) - back)

            stack.callback(charge)
        num_tokens = 0
        for request, own in zip(requests, rids or repeat(()), strict=False):
            streams.append(await stack.enter_async_context(state.engine.submit(request)))
            state.submitted[request.request_id] = names + own
            stack.callback(_ended, state, request, streams[-1])
            # Thousands of embeddings must not hold the loop, nor many choices of a long prompt.
            num_tokens += len(request.prompt_token_ids)
            if len(streams) % _SUBMITTED_AT_ONCE == 0 or num_tokens >= _TOKENS_AT_ONCE:
                num_tokens = 0
                await asyncio.sleep(0)
        yield streams


def _ended(state: State, request: Request, stream: TokenStream) -> None:
    """A stream has been left: write down what it used. What was never computed costs nobody anything."""
    state.submitted.pop(request.request_id)
    usage = USAGE.get()
    usage.add(stream)
    if stream.first_token_at is not None:
        cached = stream.num_cached_tokens
        state.accounts.add(
            CALLER.get().key, cached=cached, prompt=stream.num_prompt_tokens - cached, output=stream.num_output_tokens
        )
    if state.spans is not None:
        state.spans.ended(request, stream, state.engine.clock.now(), usage.trace_headers)


async def _stream(request: web.Request, state: State, answer: Answer, relay: _Relay) -> web.StreamResponse:
    interval = state.options.keep_alive_interval_s if answer.keep_alive else 0.0
    # What is known before the first token is an HTTP error; but a client must not wait in silence for ever.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(interval if interval > 0 else None):
            await relay.ready()
    is_silent = not relay.raise_early()
    # A client that has gone cancels this handler; a write that fails first is no news to anybody.
    events = await EventStream.open(request, answer.headers, answer.keep_alive, interval)
    with contextlib.suppress(ConnectionError):
        async with events:
            if is_silent:
                await events.write(answer.keep_alive)
                await relay.ready()
            await relay.write_to(events)
    return events.response


class _Relay:
    """From the streams of one answer to its client: events are made and sent in the very call that flushes a stream.

    The handler's task sleeps meanwhile, but for the first events and the last, and while the client is behind: then
    deltas wait in their streams, where they melt into one.
    """

    def __init__(self, answer: Answer, streams: list[TokenStream], *, no_output: bool) -> None:
        self._answer = answer
        self._streams = streams
        self._no_output = no_output
        self._events: EventStream | None = None
        # Whether flushes go straight to `_events`.
        self._is_direct = False
        # The answer is complete, or can't be; and the bytes that say so.
        self._has_ended = False
        self._last = b""
        self._waiter: asyncio.Future[None] | None = None
        for index, stream in enumerate(streams):
            stream.on_flush(partial(self._on_flush, index))

    async def ready(self) -> None:
        """Wait until a stream has something."""
        while not self._waiting():
            await self._woken()

    def raise_early(self) -> bool:
        """Raise what can still be an HTTP error. Whether there is anything."""
        waiting = self._waiting()
        for index in waiting:
            delta = self._streams[index].waiting
            assert delta is not None
            _raise_early(delta, self._answer)
        return bool(waiting)

    async def write_to(self, events: EventStream) -> None:
        """Everything from the first event to the last. Raises ConnectionError when the client has gone."""
        self._events = events
        data = self._make(self._waiting(), opening=True)
        try:
            while not self._has_ended:
                await events.write(data)
                # What came while the client was behind goes in one.
                data = self._make(self._waiting())
                if data or self._has_ended:
                    continue
                self._is_direct = True
                await self._woken()
                self._is_direct = False
                data = self._last
        finally:
            # The streams may still be aborted, which is a flush.
            self._is_direct = False
        await events.end(data)

    # ---- what the engine calls

    def _on_flush(self, index: int) -> None:
        if self._is_direct:
            assert self._events is not None
            data = self._make((index,))
            if not self._has_ended:
                try:
                    if self._events.send(data):
                        return
                except ConnectionError:
                    # The handler's next write sees the same.
                    pass
            else:
                self._last = data
            self._is_direct = False
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # ---- events

    def _make(self, indices: Iterable[int], *, opening: bool = False) -> bytes:
        """Events of what these streams have; where the answer is complete with it or fails, the last ones."""
        answer, streams = self._answer, self._streams
        made: list[bytes] = []
        try:
            if opening:
                made.append(answer.opening())
            for index in indices:
                delta = streams[index].take_now()
                made.append(answer.delta(index, _without_output(delta) if self._no_output else delta))
            if answer.num_running:
                return b"".join(made)
            made.append(answer.closing())
        except ApiError as error:
            made.append(answer.error(error))
        except BaseException as error:
            raise_fatal(error)
            logger.exception("a stream failed in the server")
            made.append(answer.error(ApiError(500, "The server had an internal error.")))
        self._has_ended = True
        return b"".join(made)

    def _waiting(self) -> list[int]:
        return [index for index, stream in enumerate(self._streams) if stream.waiting is not None]

    async def _woken(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

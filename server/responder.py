"""From TokenStreams to an HTTP response, streamed or collected. Cancellation ends here.

Leaving a handler for whatever reason leaves the `async with` of its streams, which aborts what still runs: a client
that disconnects cancels its handler, and its pages are free within a step. Loop thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Sequence
from itertools import repeat

from aiohttp import web

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
_SUBMITTED_AT_ONCE = 64

Ready = list[tuple[int, Delta]]


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
            deltas = [await _collect(stream) for stream in streams]
            if plan.no_output:
                deltas = list(map(_without_output, deltas))
            return json_response(answer.whole(deltas))
        async with contextlib.aclosing(_Source(streams, no_output=plan.no_output)) as source:
            return await _stream(request, state, answer, source)


async def _collect(stream: TokenStream) -> Delta:
    delta = await stream.collect()
    raise_early(delta)
    return delta


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
            state.keyring.check_tokens(owner, sum([len(request.prompt_token_ids) for request in requests]))
            used = owner

            def charge() -> None:
                state.keyring.charge(used, sum([stream.num_output_tokens for stream in streams]))

            stack.callback(charge)
        for request, own in zip(requests, rids or repeat(()), strict=False):
            streams.append(await stack.enter_async_context(state.engine.submit(request)))
            state.submitted[request.request_id] = names + own
            stack.callback(_ended, state, request, streams[-1])
            # Thousands of embeddings must not hold the loop.
            if len(streams) % _SUBMITTED_AT_ONCE == 0:
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


class _Source:
    """The deltas of several streams as one sequence, without a task per token."""

    def __init__(self, streams: list[TokenStream], *, no_output: bool = False) -> None:
        self._no_output = no_output
        self._only = streams[0] if len(streams) == 1 else None
        self._ready: dict[int, Delta] = {}
        self._wake = asyncio.Event()
        self._tasks = (
            [asyncio.create_task(self._pump(index, stream)) for index, stream in enumerate(streams)]
            if self._only is None
            else []
        )

    async def take(self) -> Ready:
        """What has come since the last take, at most one delta of each stream; waits for the first."""
        ready = await self._take()
        return [(index, _without_output(delta)) for index, delta in ready] if self._no_output else ready

    async def _take(self) -> Ready:
        if self._only is not None:
            return [(0, await self._only.take())]
        await self._wake.wait()
        self._wake.clear()
        ready, self._ready = self._ready, {}
        return list(ready.items())

    async def aclose(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def _pump(self, index: int, stream: TokenStream) -> None:
        async for delta in stream:
            waiting = self._ready.get(index)
            if waiting is None:
                self._ready[index] = delta
            else:
                # The client is slow: deltas melt, as they do inside a TokenStream.
                waiting.merge(delta)
            self._wake.set()


# ---- streamed


async def _stream(request: web.Request, state: State, answer: Answer, source: _Source) -> web.StreamResponse:
    interval = state.options.keep_alive_interval_s if answer.keep_alive else 0.0
    ready: Ready = []
    # What is known before the first token is an HTTP error; but a client must not wait in silence for ever.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(interval if interval > 0 else None):
            ready = await source.take()
    for _, delta in ready:
        raise_early(delta)
    # A client that has gone cancels this handler; a write that fails first is no news to anybody.
    events = await EventStream.open(request, answer.headers, answer.keep_alive, interval)
    with contextlib.suppress(ConnectionError):
        async with events:
            if not ready:
                await events.write(answer.keep_alive)
                ready = await source.take()
            await _write_events(events, answer, source, ready)
    return events.response


async def _write_events(events: EventStream, answer: Answer, source: _Source, ready: Ready) -> None:
    """Everything from the first event to the last; one write for all that is ready."""
    try:
        data = answer.opening()
        while True:
            for index, delta in ready:
                data += answer.delta(index, delta)
            if not answer.num_running:
                await events.write(data + answer.closing())
                return
            if data:
                await events.write(data)
            ready, data = await source.take(), b""
    except ApiError as error:
        await events.write(data + answer.error(error))
    except ConnectionError:
        raise
    except Exception:
        logger.exception("a stream failed in the server")
        await events.write(answer.error(ApiError(500, "The server had an internal error.")))

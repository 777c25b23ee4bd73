"""From TokenStreams to an HTTP response, streamed or collected. Cancellation ends here.

Leaving a handler for whatever reason leaves the `async with` of its streams, which aborts what still runs: a client
that disconnects cancels its handler, and its pages are free within a step. Loop thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncIterator
from functools import partial

from aiohttp import web

from engine.request import FinishReason, Request
from engine.stream import Delta, TokenStream
from server.logprobs import Logprobs, Spelling, vllm_prompt_logprobs
from server.messages import delta_of, read_message
from server.protocol.errors import ApiError, json_response
from server.protocol.generation import Plan
from server.sse import DONE, KEEP_ALIVE, Chunks, EventStream, Json, error_event
from server.state import State

logger = logging.getLogger("oneloop.server")

# Requests that are queued between two turns of the loop: one or two milliseconds of work.
_SUBMITTED_AT_ONCE = 64

Ready = list[tuple[int, Delta]]


async def respond(request: web.Request, state: State, plan: Plan) -> web.StreamResponse:
    """Run a plan and answer the client. Raises RequestError for what is known before the first token."""
    async with submitted(state, plan.requests) as streams:
        if not plan.stream:
            return await _collect(state, plan, streams)
        async with contextlib.aclosing(_Source(streams)) as source:
            return await _stream(request, state, plan, streams, source)


@contextlib.asynccontextmanager
async def submitted(state: State, requests: list[Request]) -> AsyncIterator[list[TokenStream]]:
    """The streams of all requests, or none: one that is refused takes the others back."""
    ids = [request.request_id for request in requests]
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(state.submitted.difference_update, ids)
        streams: list[TokenStream] = []
        for request in requests:
            streams.append(await stack.enter_async_context(state.engine.submit(request)))
            # Thousands of embeddings must not hold the loop.
            if len(streams) % _SUBMITTED_AT_ONCE == 0:
                await asyncio.sleep(0)
        state.submitted.update(ids)
        yield streams


class _Source:
    """The deltas of several streams as one sequence, without a task per token."""

    def __init__(self, streams: list[TokenStream]) -> None:
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


# ---- collected


async def _collect(state: State, plan: Plan, streams: list[TokenStream]) -> web.Response:
    deltas: list[Delta] = []
    for stream in streams:
        delta = await stream.collect()
        raise_early(delta)
        deltas.append(delta)
    spelling = Spelling(state.engine.tokenizer, plan.tokens_as_ids)
    choices: list[Json] = []
    for prompt in range(len(streams) // plan.num_candidates):
        first = prompt * plan.num_candidates
        # The first of a prompt's requests has its log-probabilities, whichever of them are answered with.
        of_prompt = streams[first].prompt_logprobs
        for place in _best(plan, deltas[first : first + plan.num_candidates]):
            request, delta = plan.requests[first + place], deltas[first + place]
            echo = None if plan.echoes is None else plan.echoes[prompt]
            text = (echo or "") + delta.text
            choice: Json = {"index": len(choices)}
            called = False
            if plan.reading is not None:
                parser = plan.reading.make_parser()
                choice["message"] = read_message(parser, delta.text, echo or "")
                called = parser.num_calls > 0
            elif plan.chat:
                choice["message"] = {"role": "assistant", "content": text}
            else:
                choice["text"] = text
            choice["logprobs"] = None
            if plan.logprobs is not None:
                shape = Logprobs(plan, request, echo, spelling)
                choice["logprobs"] = shape.next(delta, of_prompt)
            choice |= _ending(delta, called)
            if plan.return_token_ids:
                choice["token_ids"] = delta.token_ids
                if not plan.chat:
                    choice["prompt_token_ids"] = request.prompt_token_ids
            if plan.prompt_logprobs is not None and not plan.chat:
                choice["prompt_logprobs"] = vllm_prompt_logprobs(of_prompt, plan.prompt_logprobs, spelling)
            choices.append(choice)
    answer: Json = {
        "id": plan.id,
        "object": "chat.completion" if plan.chat else "text_completion",
        "created": plan.created,
        "model": plan.model,
        "choices": choices,
        "usage": _usage(plan, streams, sum(len(delta.token_ids) for delta in deltas)),
    }
    if plan.chat and plan.return_token_ids:
        answer["prompt_token_ids"] = plan.requests[0].prompt_token_ids
    if plan.chat and plan.prompt_logprobs is not None:
        answer["prompt_logprobs"] = vllm_prompt_logprobs(streams[0].prompt_logprobs, plan.prompt_logprobs, spelling)
    return json_response(answer)


def _best(plan: Plan, candidates: list[Delta]) -> list[int]:
    """Which candidates are answered with: OpenAI's "highest log probability per token", best first."""
    if plan.num_choices == plan.num_candidates:
        return list(range(plan.num_choices))

    def per_token(place: int) -> float:
        entries = candidates[place].logprobs
        return sum(entry.logprob for entry in entries) / len(entries) if entries else -math.inf

    return sorted(range(len(candidates)), key=per_token, reverse=True)[: plan.num_choices]


# ---- streamed


async def _stream(
    request: web.Request, state: State, plan: Plan, streams: list[TokenStream], source: _Source
) -> web.StreamResponse:
    interval = state.options.keep_alive_interval_s
    spelling = Spelling(state.engine.tokenizer, plan.tokens_as_ids)
    ready: Ready = []
    # What is known before the first token is an HTTP error; but a client must not wait in silence for ever.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(interval if interval > 0 else None):
            ready = await source.take()
    for _, delta in ready:
        raise_early(delta)
    # A client that has gone cancels this handler; a write that fails first is no news to anybody.
    events = await EventStream.open(request, interval)
    with contextlib.suppress(ConnectionError):
        async with events:
            if not ready:
                await events.write(KEEP_ALIVE)
                ready = await source.take()
            await _write_events(events, _Writer(plan, streams, spelling), source, ready)
    return events.response


async def _write_events(events: EventStream, writer: _Writer, source: _Source, ready: Ready) -> None:
    """Everything from the first role chunk to [DONE]; one write for all that is ready."""
    try:
        data = writer.opening()
        while True:
            for index, delta in ready:
                data += writer.delta(index, delta)
            if not writer.num_running:
                await events.write(data + writer.closing())
                return
            if data:
                await events.write(data)
            ready, data = await source.take(), b""
    except ApiError as error:
        await events.write(data + error_event(error))
    except ConnectionError:
        raise
    except Exception:
        logger.exception("a stream failed in the server")
        await events.write(error_event(ApiError(500, "The server had an internal error.")))


class _Writer:
    """Turns the deltas of one response into events and keeps its counts."""

    def __init__(self, plan: Plan, streams: list[TokenStream], spelling: Spelling) -> None:
        self.num_running = len(streams)
        self._plan = plan
        self._streams = streams
        self._chunks = Chunks(plan)
        self._num_output = 0
        # Whatever comes beside the text has an event even where the text is held back.
        self._only_text = not plan.return_token_ids and plan.logprobs is None and plan.echoes is None
        # Completions have no role chunk to carry the prompt's ids.
        self._owes_prompt = [plan.return_token_ids and not plan.chat] * len(streams)
        self._echoes: list[str | None] = [None] * len(streams)
        if plan.echoes is not None:
            self._echoes = [echo for echo in plan.echoes for _ in range(plan.num_candidates)]
        self._parsers = [plan.reading.make_parser() for _ in streams] if plan.reading is not None else []
        self._logprobs: list[Logprobs] = []
        if plan.logprobs is not None:
            self._logprobs = [
                Logprobs(plan, request, echo, spelling)
                for request, echo in zip(plan.requests, self._echoes, strict=True)
            ]

    def opening(self) -> bytes:
        """The role chunk of every choice; completions have none."""
        plan = self._plan
        if not plan.chat:
            return b""
        first = {"prompt_token_ids": plan.requests[0].prompt_token_ids} if plan.return_token_ids else {}
        return b"".join(
            self._chunks.choice(
                {
                    "index": index,
                    "delta": {"role": "assistant", "content": ""},
                    "logprobs": None,
                    "finish_reason": None,
                },
                self._running_usage(),
                **({} if index else first),
            )
            for index in range(len(self._streams))
        )

    def delta(self, index: int, delta: Delta) -> bytes:
        """The event of one delta; nothing for tokens whose text is held back. Raises ApiError for a failed one."""
        self._num_output += len(delta.token_ids)
        if self._only_text and delta.finish_reason is None and not self._parsers:
            return self._chunks.text(index, delta.text, self._running_usage()) if delta.text else b""
        plan = self._plan
        if delta.finish_reason is not None:
            self.num_running -= 1
            if delta.finish_reason is FinishReason.ERROR:
                raise _failure(delta)
        text, echo = delta.text, self._echoes[index]
        if echo is not None:
            text, self._echoes[index] = echo + text, None
        choice: Json = {"index": index}
        before, called = b"", False
        if self._parsers:
            deltas, called = self._read(index, delta), self._parsers[index].num_calls > 0
            if echo:
                deltas.insert(0, {"content": echo})
            if self._only_text and not deltas:
                return b""
            # All but the last are events of their own; the last one carries what comes beside the text.
            before = b"".join(map(partial(self._bare, index), deltas[:-1]))
            choice["delta"] = deltas[-1] if deltas else {}
        elif plan.chat:
            choice["delta"] = {"content": text} if text else {}
        else:
            choice["text"] = text
        choice["logprobs"] = None
        if self._logprobs and delta.token_ids:
            choice["logprobs"] = self._logprobs[index].next(delta, self._streams[index].prompt_logprobs)
        choice |= _ending(delta, called) if delta.finish_reason is not None else {"finish_reason": None}
        if plan.return_token_ids:
            choice["token_ids"] = delta.token_ids
        if self._owes_prompt[index]:
            self._owes_prompt[index] = False
            choice["prompt_token_ids"] = plan.requests[index].prompt_token_ids
        return before + self._chunks.choice(choice, self._running_usage())

    def _read(self, index: int, delta: Delta) -> list[Json]:
        """What a delta's text means; an empty one at the end, which brings the finish reason."""
        parser = self._parsers[index]
        events = parser.push(delta.text) if delta.text else []
        if delta.finish_reason is None:
            return [delta_of(event) for event in events]
        return [*(delta_of(event) for event in (*events, *parser.finish())), {}]

    def _bare(self, index: int, delta: Json) -> bytes:
        choice: Json = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return self._chunks.choice(choice, self._running_usage())

    def closing(self) -> bytes:
        """The usage chunk, if asked for, and the terminator."""
        if not self._plan.include_usage:
            return DONE
        return self._chunks.usage(_usage(self._plan, self._streams, self._num_output)) + DONE

    def _running_usage(self) -> Json | None:
        if not self._plan.continuous_usage:
            return None
        return _usage(self._plan, self._streams, self._num_output)


# ---- both


def _usage(plan: Plan, streams: list[TokenStream], num_output: int) -> Json:
    """A prompt counts once, however many choices it has; what its first choice found in the cache is its share."""
    firsts = streams[:: plan.num_candidates]
    num_prompt = sum(stream.num_prompt_tokens for stream in firsts)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": sum(stream.num_cached_tokens for stream in firsts)},
    }


def _ending(delta: Delta, called: bool = False) -> Json:
    """Why a choice ended, under the names of OpenAI, vLLM and SGLang. called: it holds calls of tools."""
    assert delta.finish_reason is not None
    reason = delta.stop_reason
    word = "tool_calls" if called and delta.finish_reason is FinishReason.STOP else delta.finish_reason.value
    return {"finish_reason": word, "stop_reason": reason, "matched_stop": reason}


def _failure(delta: Delta) -> ApiError:
    return ApiError(400 if delta.bad_request else 500, delta.error or "The model failed to compute this request.")


def raise_early(delta: Delta) -> None:
    """Raise what can still be an HTTP error."""
    if delta.finish_reason is FinishReason.ERROR:
        raise _failure(delta)
    if delta.finish_reason is FinishReason.ABORT and not delta.token_ids:
        raise ApiError(503, "The request was aborted before its first token.")

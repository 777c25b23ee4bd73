"""Background responses: those of /v1/responses that go on without their client, and are asked about later.

A job keeps its events, numbered from 0, so that any number of clients can follow it, from any of them on. They are made
token by token: the same tokens give the same numbers, however they come. It ends up in the response store; its events
stay as long as there is room. Loop thread.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import random
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Iterator
from functools import partial
from typing import Any

import orjson
from aiohttp import web

from engine.request import RequestError
from engine.stream import Delta, TokenStream
from engine.text.detokenizer import IncrementalDetokenizer
from server.adapters import prepare
from server.answers.responses import ResponsesAnswer
from server.journal import Begun, Journal
from server.protocol.body import Body
from server.protocol.errors import ApiError
from server.protocol.generation import Plan
from server.protocol.naming import in_words_of
from server.protocol.responses import NAMES, parse_response
from server.request_log import Usage
from server.responder import submitted
from server.state import CALLER, USAGE, Caller, State

logger = logging.getLogger("oneloop.server")

Json = dict[str, Any]


class Job:
    """One response. events: whole server-sent events; the index of each is its sequence number."""

    def __init__(self, state: State, plan: Plan, names: tuple[str, ...]) -> None:
        self.plan = plan
        self.events: list[bytes] = []
        self.num_bytes = 0
        self.is_done = False
        self.is_cancelled = False
        self.on_end: Callable[[], object] | None = None
        self._state = state
        self._names = names
        self._answer: ResponsesAnswer | None = None
        self._news: asyncio.Future[None] | None = None
        self._task: asyncio.Task[None] | None = None
        self._detokenizer: IncrementalDetokenizer | None = None
        if plan.logprobs is None:  # else the answer goes token by token itself
            request = plan.requests[0]
            self._detokenizer = IncrementalDetokenizer(state.tokenizer, request.prompt_token_ids, request.sampling)

    async def start(self, make_answer: Callable[[State, Plan, list[TokenStream]], ResponsesAnswer]) -> bytes:
        """Queue it. Returns the JSON of the Response as it is now; raises RequestError for what is refused."""
        queued: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        # Nobody asks what became of it where the client has gone meanwhile.
        queued.add_done_callback(lambda done: done.cancelled() or done.exception())
        # It has the context of its request, and with it whose it is.
        self._task = asyncio.create_task(self._run(make_answer, queued), name=f"background {self.plan.id}")
        # The client may go, the job stays.
        return await asyncio.shield(queued)

    async def _run(
        self, make_answer: Callable[[State, Plan, list[TokenStream]], ResponsesAnswer], queued: asyncio.Future[bytes]
    ) -> None:
        owner = CALLER.get().owner
        if owner is not None:
            owner.num_running += 1
        with self._state.in_flight:
            try:
                async with submitted(self._state, self.plan.requests, self._names) as streams:
                    answer = self._answer = make_answer(self._state, self.plan, streams)
                    queued.set_result(orjson.dumps(answer.current("queued")))
                    await self._answer_all(answer, streams[0])
            except RequestError as error:
                if not queued.done():
                    queued.set_exception(error)
            finally:
                if owner is not None:
                    owner.num_running -= 1
                if not queued.done():
                    queued.cancel()
                self.is_done = True
                self._tell(b"")
                if self.on_end is not None:
                    self.on_end()

    async def _answer_all(self, answer: ResponsesAnswer, stream: TokenStream) -> None:
        try:
            self._tell(answer.opening())
            while answer.num_running:
                for delta in self._by_token(await stream.take()):
                    self._tell(answer.delta(0, delta))
            self._tell(answer.cancelled() if self.is_cancelled else answer.closing())
        except RequestError as error:
            self._tell(answer.error(error))
        except asyncio.CancelledError:
            self._tell(answer.cancelled())
            raise
        except Exception:
            logger.exception("a background response failed in the server")
            self._tell(answer.error(ApiError(500, "The server had an internal error.")))

    def _by_token(self, delta: Delta) -> Iterator[Delta]:
        """The delta in pieces of one token; its last piece has what had been held back, and its end."""
        length = 0
        for token in delta.token_ids if self._detokenizer is not None else ():
            piece = self._detokenizer.push([token])  # type: ignore[union-attr]
            length += len(piece)
            yield Delta(piece, [token])
        rest = [] if self._detokenizer is not None else delta.token_ids
        yield dataclasses.replace(delta, text=delta.text[length:], token_ids=rest)

    def _tell(self, data: bytes) -> None:
        # No event has an empty line in it: it is JSON.
        self.events += [event + b"\n\n" for event in data.split(b"\n\n")[:-1]]
        self.num_bytes += len(data)
        if self._news is not None and not self._news.done():
            self._news.set_result(None)
        self._news = None

    def response(self) -> Json:
        """The Response while it runs."""
        assert self._answer is not None
        return self._answer.current("in_progress" if self.events else "queued")

    @property
    def was_cut_short(self) -> bool:
        """It has ended, but neither by itself nor by its client."""
        return not self.is_cancelled and (not self.events or b"event: response.failed" in self.events[-1])

    async def follow(self, after: int) -> AsyncGenerator[bytes, None]:
        """Events behind number `after`, those that are there at once, until its end."""
        place = after + 1
        while True:
            if place < len(self.events):
                data = b"".join(self.events[place:])
                place = len(self.events)
                yield data
            elif self.is_done:
                return
            else:
                if self._news is None:
                    self._news = asyncio.get_running_loop().create_future()
                # One future for all who follow: nobody's going may cancel it.
                await asyncio.shield(self._news)

    async def cancel(self) -> None:
        """End it now; returns when it has ended."""
        assert self._task is not None
        self.is_cancelled = True
        for request in self.plan.requests:
            self._state.engine.abort(request.request_id)
        await asyncio.wait({self._task})


class Jobs:
    """By owner and id. Those that have ended stay while all of them have fewer bytes than max_bytes."""

    def __init__(self, max_entries: int, max_bytes: int, journal: Journal | None = None) -> None:
        self._max_entries, self._max_bytes = max_entries, max_bytes
        self._journal = journal
        self._jobs: OrderedDict[tuple[str, str], Job] = OrderedDict()

    async def start(self, state: State, body: Body, response_id: str, names: tuple[str, ...]) -> tuple[Job, bytes]:
        """A new job, and the Response as it is now. Raises RequestError for what cannot be served."""
        if self._journal is not None and not body.has("seed"):
            body = body.changed({"seed": random.getrandbits(62)})
        return await self._start(state, body, response_id, names)

    async def resume(self, state: State) -> None:
        """What an earlier process had begun and not ended; and what it had ended is kept again."""
        journal = self._journal
        if journal is None:
            return
        for ended in journal.ended:
            state.responses.put(ended.owner, ended.response, ended.items)
        for begun in journal.begun:
            key = state.keyring.named(begun.owner)
            before, usage_before = CALLER.set(Caller(begun.owner, key)), USAGE.set(Usage())
            try:
                if begun.owner and key is None:
                    raise RequestError("The key of this response is gone.")
                await prepare(state, Body(begun.body))
                await self._start(state, Body(begun.body), begun.id, (begun.id,), begun.created)
            except RequestError as error:
                logger.error("response %s of the journal cannot be taken up again: %s", begun.id, error)
                journal.end(begun.owner, begun.id)
            finally:
                USAGE.reset(usage_before)
                CALLER.reset(before)

    async def _start(
        self, state: State, body: Body, response_id: str, names: tuple[str, ...], created: int | None = None
    ) -> tuple[Job, bytes]:
        owner, journal = CALLER.get().key, self._journal
        plan, asked = await parse_response(body.changed({"stream": True}), state, response_id, owner)
        if created is not None:
            plan = dataclasses.replace(plan, created=created)
        job = Job(state, plan, names)
        if journal is not None:
            if created is None:
                journal.begin(Begun(response_id, owner, body.values, plan.created))
            job.on_end = partial(self._on_end, state, owner, job)
        self.add(owner, job)
        try:
            with in_words_of(NAMES):
                return job, await job.start(partial(ResponsesAnswer, asked))
        except RequestError:
            self.delete(owner, response_id)
            raise

    def _on_end(self, state: State, owner: str, job: Job) -> None:
        assert self._journal is not None
        if state.engine.draining and job.was_cut_short:
            return  # the next process takes it up
        stored = state.responses.get(owner, job.plan.id)
        if stored is None:
            self._journal.end(owner, job.plan.id)
        else:
            self._journal.end(owner, job.plan.id, orjson.Fragment(stored.response), orjson.Fragment(stored.input))

    def add(self, owner: str, job: Job) -> None:
        self._jobs[owner, job.plan.id] = job
        self._make_room()

    def get(self, owner: str, response_id: str) -> Job | None:
        return self._jobs.get((owner, response_id))

    def delete(self, owner: str, response_id: str) -> None:
        self._jobs.pop((owner, response_id), None)

    def forget(self, owner: str, response_id: str) -> None:
        """It was deleted by its owner."""
        self.delete(owner, response_id)
        if self._journal is not None:
            self._journal.end(owner, response_id)

    def clear(self) -> None:
        """Forget those that have ended."""
        self._jobs = OrderedDict((name, job) for name, job in self._jobs.items() if not job.is_done)

    def _make_room(self) -> None:
        """The oldest that have ended go first; those that run are the queue's to bound."""
        done = [name for name, job in self._jobs.items() if job.is_done]
        size = sum(job.num_bytes for job in self._jobs.values())
        for name in done:
            if len(self._jobs) <= self._max_entries and size <= self._max_bytes:
                return
            size -= self._jobs.pop(name).num_bytes


JOBS = web.AppKey("jobs", Jobs)

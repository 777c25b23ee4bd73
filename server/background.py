"""Background responses: those of /v1/responses that go on without their client, and are asked about later.

A job keeps its events, numbered from 0, so that any number of clients can follow it, from any of them on. They are made
token by token: the same tokens give the same numbers, however they come. It ends up in the response store; its events
stay as long as there is room. Loop thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import random
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import orjson
from aiohttp import web

from engine.request import RequestError, UnavailableError
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
T = TypeVar("T")


class Job:
    """One response. events: whole server-sent events; the index of each is its sequence number."""

    def __init__(self, state: State, plan: Plan, names: tuple[str, ...]) -> None:
        self.plan = plan
        self.events: list[bytes] = []
        self.num_bytes = 0
        self.is_done = False
        self.is_cancelled = False
        # In a journal: where this process has to stop, another one goes on, and nobody is told of an end.
        self.is_lasting = False
        self.is_left = False
        self.was_cut_short = False
        self.num_followers = 0
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
                if not self.events:
                    self._tell_end(b"", cut=not self.is_cancelled)
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
            end = answer.cancelled() if self.is_cancelled else answer.closing()
            # It was aborted, and not by its client.
            self._tell_end(end, cut=not self.is_cancelled and b"event: response.failed" in end)
        except RequestError as error:
            self._tell_end(answer.error(error), cut=True)
        except asyncio.CancelledError:
            self._tell_end(answer.cancelled(), cut=True)
            raise
        except Exception:
            logger.exception("a background response failed in the server")
            self._tell(answer.error(ApiError(500, "The server had an internal error.")))

    def _tell_end(self, data: bytes, *, cut: bool) -> None:
        """cut: it has ended, but neither by itself nor by its client."""
        if cut and self.is_lasting and (self.is_left or self._state.engine.draining):
            self.was_cut_short = True
        else:
            self._tell(data)

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

    async def follow(self, after: int) -> AsyncGenerator[bytes, None]:
        """Events behind number `after`, those that are there at once, until its end."""
        place = after + 1
        self.num_followers += 1
        try:
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
        finally:
            self.num_followers -= 1

    async def cancel(self) -> None:
        """End it now; returns when it has ended."""
        assert self._task is not None
        self.is_cancelled = True
        self._abort()
        await asyncio.wait({self._task})

    def leave(self) -> None:
        """Another process goes on with it."""
        self.is_left = True
        self._abort()

    def _abort(self) -> None:
        for request in self.plan.requests:
            self._state.engine.abort(request.request_id)


class Jobs:
    """By owner and id. Those that have ended stay while all of them have fewer bytes than max_bytes."""

    def __init__(self, max_entries: int, max_bytes: int, journal: Journal | None = None) -> None:
        self._max_entries, self._max_bytes = max_entries, max_bytes
        self._journal = journal
        # The journal's calls, one after the other: what is begun is written before its end is.
        self._thread = ThreadPoolExecutor(1, "journal") if journal is not None else None
        self._num_calls = 0
        self._jobs: OrderedDict[tuple[str, str], Job] = OrderedDict()
        self._watching: asyncio.Task[None] | None = None
        self._looking = asyncio.Lock()
        self._looks: set[asyncio.Task[None]] = set()
        self._hands_over = False
        # At each look another one.
        self._looked = asyncio.Event()
        # What another process had ended lately: its events can be made again.
        self._ended_elsewhere: OrderedDict[tuple[str, str], Begun] = OrderedDict()

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
        journal.ended = []
        await self._take_up(state, journal)
        if journal.has_company:
            self._watching = asyncio.create_task(self._watch(state, journal), name="journal")

    async def close(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait({self._watching})
        if self._looks:
            await asyncio.wait(self._looks)
        if self._thread is not None:
            # What has ended is written down, and what ends meanwhile, too.
            num_calls = -1
            while num_calls != self._num_calls:
                num_calls = self._num_calls
                await asyncio.get_running_loop().run_in_executor(self._thread, lambda: None)
            # It has nothing more to do. Later calls are made at once.
            thread, self._thread = self._thread, None
            thread.shutdown()

    async def _ask(self, call: Callable[..., T], *arguments: Any) -> T:
        """A call of the journal, in its thread."""
        self._num_calls += 1
        return await asyncio.get_running_loop().run_in_executor(self._thread, call, *arguments)

    def _tell(self, call: Callable[..., None], *arguments: Any) -> None:
        """One that nobody waits for."""
        self._num_calls += 1
        if self._thread is None:
            call(*arguments)
        else:
            self._thread.submit(call, *arguments).add_done_callback(_report)

    async def _watch(self, state: State, journal: Journal) -> None:
        """As long as another process writes the journal: that one hands over to this one."""
        while journal.has_company:
            await asyncio.sleep(_LOOK_S)
            await self._look(state, journal)

    async def _look(self, state: State, journal: Journal) -> None:
        # Whoever asked may go: what was read is read once.
        look = asyncio.create_task(self._look_now(state, journal))
        self._looks.add(look)
        look.add_done_callback(self._looks.discard)
        await asyncio.shield(look)

    async def _look_now(self, state: State, journal: Journal) -> None:
        async with self._looking:
            news = await self._ask(journal.look)
            for owner, name in news.forgotten:
                state.responses.delete(owner, name)
                self._ended_elsewhere.pop((owner, name), None)
            for ended in news.ended.values():
                state.responses.put(ended.owner, ended.response, ended.items)
                if ended.begun is not None:
                    self._ended_elsewhere[ended.owner, ended.begun.id] = ended.begun
            while len(self._ended_elsewhere) > self._max_entries:
                self._ended_elsewhere.popitem(last=False)
            await self._take_up(state, journal)
        self._looked.set()
        self._looked = asyncio.Event()

    async def _take_up(self, state: State, journal: Journal) -> None:
        """What nobody computes."""
        for begun in await self._ask(lambda: journal.begun):
            # What this process leaves to the next one is not its own again.
            if not (state.engine.draining or self._hands_over) and await self._ask(journal.claim, begun):
                try:
                    await self._compute_again(state, begun)
                except RequestError as error:
                    if error.status in (429, 503):
                        self._tell(journal.leave, begun.id)  # not now
                    else:
                        self._tell(journal.end, begun.owner, begun.id)
                    logger.error("response %s of the journal cannot be taken up again: %s", begun.id, error)

    async def _compute_again(self, state: State, begun: Begun) -> None:
        """Raises RequestError where it is refused now."""
        key = state.keyring.named(begun.owner)
        before, usage_before = CALLER.set(Caller(begun.owner, key)), USAGE.set(Usage())
        try:
            if begun.owner and key is None:
                raise RequestError("The key of this response is gone.")
            await prepare(state, Body(begun.body))
            await self._start(state, Body(begun.body), begun.id, (begun.id,), begun.created)
        finally:
            USAGE.reset(usage_before)
            CALLER.reset(before)

    async def settle(self, state: State, response_id: str) -> None:
        """Before a response is looked for: where another process computes it yet, wait until that has ended it, or
        leaves it to this one. Raises UnavailableError where that takes too long."""
        journal, owner = self._journal, CALLER.get().key
        if journal is None or self._watching is None or self._watching.done():
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(state.options.drain_timeout_s + _LOOK_S * 50):
                await self._look(state, journal)
                while True:
                    looked = self._looked  # it may be looked while it is asked for
                    if not await self._ask(journal.elsewhere, owner, response_id):
                        # What was ended or left since that look, this process knows by one more.
                        await self._look(state, journal)
                        return
                    await looked.wait()
        raise UnavailableError("This response is another process's still; ask again.")

    async def events_of(self, state: State, response_id: str) -> Job | None:
        """The job of a response. Of one that another process had ended, the events are made again."""
        owner = CALLER.get().key
        async with self._looking:
            begun = self._ended_elsewhere.get((owner, response_id))
            if begun is not None and self.get(owner, response_id) is None:
                await self._compute_again(state, begun)
            self._ended_elsewhere.pop((owner, response_id), None)
            return self.get(owner, response_id)

    async def hand_over(self) -> None:
        """Another process takes over: it goes on with what nobody follows here. Until it is cancelled."""
        try:
            while self._journal is not None and await self._ask(self._journal.has_heirs):
                self._hands_over = True
                for job in self._jobs.values():
                    if not (job.is_done or job.is_left or job.is_cancelled or job.num_followers):
                        job.leave()
                await asyncio.sleep(_LOOK_S)
        finally:
            self._hands_over = False

    async def _start(
        self, state: State, body: Body, response_id: str, names: tuple[str, ...], created: int | None = None
    ) -> tuple[Job, bytes]:
        owner, journal = CALLER.get().key, self._journal
        plan, asked = await parse_response(body.changed({"stream": True}), state, response_id, owner)
        if created is not None:
            plan = dataclasses.replace(plan, created=created)
        job = Job(state, plan, names)
        if journal is not None:
            job.is_lasting = True
            if created is None:
                try:
                    await self._ask(journal.begin, Begun(response_id, owner, body.values, plan.created))
                except asyncio.CancelledError:
                    self._tell(journal.end, owner, response_id)  # it never began
                    raise
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
        if job.was_cut_short:
            self._tell(self._journal.leave, job.plan.id)
            return
        stored = state.responses.get(owner, job.plan.id)
        if stored is None:
            self._tell(self._journal.end, owner, job.plan.id)
        else:
            parts = orjson.Fragment(stored.response), orjson.Fragment(stored.input)
            self._tell(self._journal.end, owner, job.plan.id, *parts)

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
            self._tell(self._journal.end, owner, response_id)

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


def _report(done: Future[None]) -> None:
    if (error := done.exception()) is not None:
        logger.error("the journal failed", exc_info=error)


# Between two looks at what another process writes.
_LOOK_S = 0.05
JOBS = web.AppKey("jobs", Jobs)

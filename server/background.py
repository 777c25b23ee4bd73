"""Background responses: those of /v1/responses that go on without their client, and are asked about later.

A job keeps its events, numbered from 0, so that any number of clients can follow it, from any of them on. It ends up in
the response store; its events stay as long as there is room. Loop thread.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable
from typing import Any

import orjson
from aiohttp import web

from engine.request import RequestError
from engine.stream import TokenStream
from server.answers.responses import ResponsesAnswer
from server.protocol.errors import ApiError
from server.protocol.generation import Plan
from server.responder import submitted
from server.state import CALLER, State

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
        self._state = state
        self._names = names
        self._answer: ResponsesAnswer | None = None
        self._news: asyncio.Future[None] | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self, make_answer: Callable[[State, Plan, list[TokenStream]], ResponsesAnswer]) -> bytes:
        """Queue it. Returns the JSON of the Response as it is now; raises RequestError for what is refused."""
        queued: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
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

    async def _answer_all(self, answer: ResponsesAnswer, stream: TokenStream) -> None:
        try:
            self._tell(answer.opening())
            while answer.num_running:
                self._tell(answer.delta(0, await stream.take()))
            self._tell(answer.cancelled() if self.is_cancelled else answer.closing())
        except RequestError as error:
            self._tell(answer.error(error))
        except asyncio.CancelledError:
            self._tell(answer.cancelled())
            raise
        except Exception:
            logger.exception("a background response failed in the server")
            self._tell(answer.error(ApiError(500, "The server had an internal error.")))

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

    def __init__(self, max_entries: int, max_bytes: int) -> None:
        self._max_entries, self._max_bytes = max_entries, max_bytes
        self._jobs: OrderedDict[tuple[str, str], Job] = OrderedDict()

    def add(self, owner: str, job: Job) -> None:
        self._jobs[owner, job.plan.id] = job
        self._make_room()

    def get(self, owner: str, response_id: str) -> Job | None:
        return self._jobs.get((owner, response_id))

    def delete(self, owner: str, response_id: str) -> None:
        self._jobs.pop((owner, response_id), None)

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

"""What stands before the replicas: an ASGI application that reads a request, has it answered by a replica of its model,
and passes the answer on in whole events.

A replica that dies before its answer began costs a client nothing: another one is asked. One that dies in the middle
of a stream ends it with an error event in the words of the API. Knows no Ray: a Backend is what asks a deployment.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol

import orjson

from engine.request import RequestError, UnavailableError
from server.app import ADMIN_ENDPOINTS, ENDPOINTS
from server.protocol import anthropic, errors
from server.ray.bridge import HOP, Ask, Head, Piece
from server.ray.merging import merge
from server.ray.prefixes import Beginnings, beginnings, read_body
from server.sse import error_event

logger = logging.getLogger("oneloop.ray")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

# Replicas that are asked, one after another, for an answer of which nothing has come yet: more would let a request that
# ends its replica end them all.
TRIES = 2
# Names of models are asked for anew after so long, and where an unknown one is asked for.
NAMES_S = 10.0
MOST_RESPONSES = 10_000
REPLICA_HEADER = "X-Oneloop-Replica"
_SHAPES = {
    path: getattr(endpoint, "ERROR_SHAPE", errors.error_body)
    for endpoint in ENDPOINTS
    for _, path, _ in endpoint.ROUTES
}
# What changes a replica is done to all of them.
_FOR_ALL = {path for endpoint in ADMIN_ENDPOINTS for method, path, _ in endpoint.ROUTES if method == "POST"}
# Their streams have no mark at their end.
_LLAMACPP = ("/completion", "/infill")
_RESPONSE_ID = re.compile(rb'"id":\s?"(resp_[0-9A-Za-z_-]{1,64})"')
_NUMBER = re.compile(rb'"sequence_number":\s?(\d{1,12})')
# Serve's proxy writes these itself.
_PROXYS = ("date", "server", "x-request-id")
_EVENTS, _LINES = b"\n\n", b"\n"
_HEX = re.compile(r"[!-~]{1,128}")


class GoneError(Exception):
    """The replica that was to answer is no more, or what it said cannot be read to its end."""


class FullError(Exception):
    """More requests wait for this model than may."""


class Backend(Protocol):
    """The replicas of one model."""

    def answer(self, ask: Ask) -> AsyncGenerator[Piece, None]:
        """A Head, then bytes, of some replica. Raises GoneError, FullError."""
        ...

    async def answer_all(self, ask: Ask) -> list[tuple[Head, bytes]]:
        """Of every replica there is."""
        ...


@dataclass(slots=True)
class _Names:
    """Which backend has a model's name. asked_at: on the monotonic clock."""

    of: dict[str, int]
    asked_at: float = float("-inf")


class Front:
    """`front(scope, receive, send)`. max_body: bytes; what is larger is not read to its end, and a replica says 413."""

    def __init__(self, backends: Sequence[Backend], *, max_body: int, root_path: str = "") -> None:
        self._backends = backends
        self._max_body = max_body
        self._root = root_path.rstrip("/")
        self._names = _Names({})
        # Who keeps a response of /v1/responses, for its later turns.
        self._keepers: OrderedDict[str, tuple[int, str]] = OrderedDict()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await _lifespan(receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1003})
        body = await _read(receive, self._max_body)
        if body is None:
            return
        answering = asyncio.create_task(self._answer(scope, body, send))
        leaving = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            if not answering.done():
                answering.cancel()
            await asyncio.wait({answering, leaving})
        if not answering.cancelled():
            answering.result()

    # ---- one request

    async def _answer(self, scope: Message, body: bytes, send: Send) -> None:
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
        known = {name.lower(): value for name, value in headers}
        path, query = scope.get("raw_path") or scope["path"].encode(), scope.get("query_string", b"")
        target = (path + (b"?" + query if query else b"")).decode("latin-1")
        route = self._route(scope["path"])
        given = known.get("x-request-id", "")
        request_id = given if _HEX.fullmatch(given) else uuid.uuid4().hex
        headers = [(name, value) for name, value in headers if name.lower() not in (*HOP, "x-request-id")]
        headers.append(("X-Request-Id", request_id))
        fields = read_body(body) if body else {}
        try:
            begins = beginnings(fields, known)
        except TypeError:  # nested deeper than can be written: the replica says so
            fields, begins = {}, Beginnings()
        ask = Ask(scope["method"], target, headers, body, begins)
        reply = _Reply(send, route, request_id)
        try:
            if route in _FOR_ALL or route == "/metrics":
                return await self._ask_all(ask, reply)
            index, keeper = await self._pick(route, fields, known)
            await self._ask_one(index, replace(ask, keeper=keeper), reply)
        except FullError:
            error = RequestError("More requests wait than --max-queued-requests allows.")
            error.status, error.code, error.retry_after = 429, "rate_limit_exceeded", 1.0
            await reply.failed(error)
        except GoneError as error:
            logger.warning("request %s: %s", request_id, error)
            await reply.failed(UnavailableError("The replica that answered this request has ended."))

    async def _ask_one(self, index: int, ask: Ask, reply: _Reply) -> None:
        for left in reversed(range(TRIES)):
            try:
                async with aclosing(self._backends[index].answer(ask)) as pieces:
                    async for piece in pieces:
                        if isinstance(piece, Head) and reply.route == "/v1/responses":
                            reply.on_begin = lambda data, head=piece: self._keep(data, index, head)
                        await reply.pass_on(piece)
                    await reply.end()
                return
            except GoneError as error:
                # What a client has seen the beginning of is another answer from another replica, if only by its id.
                if reply.begun or not left:
                    raise
                logger.warning("%s; the request goes to another replica", error)
                ask = replace(ask, keeper=None)

    async def _ask_all(self, ask: Ask, reply: _Reply) -> None:
        """The worst of all answers is the answer; where all are well, metrics are put together."""
        answers = [one for backend in self._backends for one in await backend.answer_all(ask)]
        if not answers:
            raise GoneError("there is no replica")
        head, data = max(answers, key=lambda answer: answer[0].status)
        headers = head.headers
        if reply.route == "/metrics" and head.status == 200:
            data = merge((_replica_of(one), text.decode()) for one, text in answers).encode()
            headers = [(name, value) for name, value in headers if name.lower() != "content-length"]
        await reply.pass_on(Head(head.status, [*headers, ("X-Oneloop-Replicas", str(len(answers)))]))
        await reply.pass_on(data)
        await reply.end()

    # ---- whose it is

    def _route(self, path: str) -> str:
        """As it stands in the tables above."""
        path = path.removeprefix(self._root).rstrip("/") or "/"
        return path if path in _SHAPES or f"/v1{path}" not in _SHAPES else f"/v1{path}"

    async def _pick(self, route: str, fields: dict[str, Any], headers: dict[str, str]) -> tuple[int, str | None]:
        """Which backend, and which of its replicas must answer, if one must."""
        response_id = fields.get("previous_response_id")
        if route.startswith("/v1/responses/"):
            response_id = route.removeprefix("/v1/responses/").partition("/")[0]
        if isinstance(response_id, str) and (kept := self._keepers.get(response_id)) is not None:
            return kept
        name = fields.get("model")
        if len(self._backends) == 1 or not isinstance(name, str):
            return 0, None
        names, now = self._names, time.monotonic()
        if now - names.asked_at > (NAMES_S if name in names.of else 1.0):
            names.asked_at = now
            names.of = await self._ask_names(headers) or names.of
        # What nobody knows is told by the first, in its words.
        return names.of.get(name, names.of.get(name.partition(":")[0], 0)), None

    async def _ask_names(self, headers: dict[str, str]) -> dict[str, int]:
        """Of models and adapters, as each backend's own list says them."""
        given = [(name, headers[name]) for name in ("authorization", "x-api-key") if name in headers]
        found: dict[str, int] = {}
        for index, entries in enumerate(await self._lists(Ask("GET", "/v1/models", given))):
            for entry in entries:
                found.setdefault(entry["id"], index)
        return found

    async def _lists(self, ask: Ask) -> list[list[dict[str, Any]]]:
        lists: list[list[dict[str, Any]]] = []
        for backend in self._backends:
            data, status = b"", 0
            with suppress(GoneError, FullError):
                async with aclosing(backend.answer(ask)) as pieces:
                    async for piece in pieces:
                        if isinstance(piece, Head):
                            status = piece.status
                        else:
                            data += piece
            lists.append(orjson.loads(data).get("data", []) if status == 200 else [])
        return lists

    def _keep(self, data: bytes, index: int, head: Head) -> None:
        replica = _replica_of(head)
        if replica and (found := _RESPONSE_ID.search(data)) is not None:
            self._keepers[found[1].decode()] = index, replica
            while len(self._keepers) > MOST_RESPONSES:
                self._keepers.popitem(last=False)


def _replica_of(head: Head) -> str:
    return next((value for name, value in head.headers if name == REPLICA_HEADER), "")


class _Reply:
    """What goes to the client. begun: its head has gone out."""

    def __init__(self, send: Send, route: str, request_id: str) -> None:
        self.route = route
        self.begun = False
        self.on_begin: Callable[[bytes], None] | None = None
        self._send, self._request_id = send, request_id
        self._ends: bytes | None = None
        self._rest = b""
        self._last_number = -1

    async def pass_on(self, piece: Piece) -> None:
        if isinstance(piece, Head):
            kinds = {name.lower(): value for name, value in piece.headers}
            kind = kinds.get("content-type", "").partition(";")[0]
            self._ends = {"text/event-stream": _EVENTS, "application/x-ndjson": _LINES}.get(kind)
            self.begun = True
            told = [(name.lower(), value) for name, value in piece.headers if name.lower() not in _PROXYS]
            headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in told]
            await self._send({"type": "http.response.start", "status": piece.status, "headers": headers})
            return
        if self.on_begin is not None:
            self.on_begin(piece)
            self.on_begin = None
        if self._ends is not None:
            # Half an event is kept back: should the other half never come, an error can still follow.
            whole, end, rest = (self._rest + piece).rpartition(self._ends)
            piece, self._rest = whole + end, rest
            if self.route == "/v1/responses" and (numbers := _NUMBER.findall(piece)):
                self._last_number = int(numbers[-1])
        if piece:
            await self._send({"type": "http.response.body", "body": piece, "more_body": True})

    async def end(self) -> None:
        await self._send({"type": "http.response.body", "body": self._rest, "more_body": False})

    async def failed(self, error: RequestError) -> None:
        """As the API of this route says it: an error body, or the last event of a stream. Raises where neither can be:
        a body that has begun and is no stream ends with its connection."""
        if not self.begun:
            shape = _SHAPES.get(self.route, errors.error_body)
            response = errors.error_response(error, {"X-Request-Id": self._request_id}, shape(error, self._request_id))
            headers = [(name.lower(), value) for name, value in response.headers.items()]
            assert isinstance(response.body, bytes)
            await self.pass_on(Head(response.status, headers))
            await self._send({"type": "http.response.body", "body": response.body, "more_body": False})
            return
        if self._ends is None:
            raise ConnectionError("an answer ends before its end")
        self._rest = self._error_event(error)
        await self.end()

    def _error_event(self, error: RequestError) -> bytes:
        if self._ends == _LINES:
            shape = _SHAPES.get(self.route, errors.error_body)
            return orjson.dumps(shape(error, self._request_id)) + b"\n"
        if self.route == "/v1/messages":
            return b"event: error\ndata: " + orjson.dumps(anthropic.error_body(error, self._request_id)) + b"\n\n"
        if self.route.startswith("/v1/responses"):
            number = self._last_number + 1
            fields = {"type": "error", "code": error.code, "message": str(error), "param": None}
            return b"event: error\ndata: " + orjson.dumps(fields | {"sequence_number": number}) + b"\n\n"
        if self.route in _LLAMACPP:
            return b"data: " + orjson.dumps(errors.error_body(error)) + b"\n\n"
        return error_event(error)


async def _read(receive: Receive, limit: int) -> bytes | None:
    """The body, or a byte more than `limit` of it. None where the client left."""
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        part = message.get("body", b"")
        parts.append(part)
        size += len(part)
        if size > limit:
            return b"".join(parts)[: limit + 1]
        if not message.get("more_body", False):
            return b"".join(parts)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return

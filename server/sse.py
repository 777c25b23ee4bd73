"""Bytes of server-sent events: the chunks of one response, and the open stream that they are written to.

A token costs one JSON string and two concatenations; everything else of a chunk is encoded once per response.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import TracebackType

import orjson
from aiohttp import web
from aiohttp.abc import AbstractStreamWriter

from engine.recorder import TRACERS, now, stretched
from engine.request import RequestError
from server.protocol.errors import error_body
from server.protocol.generation import Plan

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
EVENT_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    # nginx would otherwise collect the stream before it passes it on.
    "X-Accel-Buffering": "no",
}

Json = dict[str, object]


class Chunks:
    """The events of one streamed response."""

    def __init__(self, plan: Plan) -> None:
        head = {
            "id": plan.id,
            "object": "chat.completion.chunk" if plan.chat else "text_completion",
            "created": plan.created,
            "model": plan.model,
        }
        self._head = b"data: " + orjson.dumps(head)[:-1]
        field = b',"delta":{"content":' if plan.chat else b',"text":'
        self._starts = [
            self._head + b',"choices":[{"index":' + str(index).encode() + field for index in range(len(plan.requests))
        ]
        self._end = (b"}" if plan.chat else b"") + b',"logprobs":null,"finish_reason":null}]'
        self._close = (b',"usage":null' if plan.include_usage else b"") + b"}\n\n"
        self._end_and_close = self._end + self._close

    def text(self, index: int, text: str, usage: Json | None) -> bytes:
        """More text of one choice, and nothing else."""
        if usage is None:
            return self._starts[index] + orjson.dumps(text) + self._end_and_close
        return self._starts[index] + orjson.dumps(text) + self._end + self._tail(usage)

    def choice(self, choice: Json, usage: Json | None, **extra: object) -> bytes:
        """Any other chunk of one choice. extra: fields beside `choices`."""
        fields: Json = {"choices": [choice], **extra}
        return self._head + b"," + orjson.dumps(fields)[1:-1] + self._tail(usage)

    def usage(self, usage: Json) -> bytes:
        """The chunk without choices that closes a stream which asked for usage."""
        return self._head + b',"choices":[]' + self._tail(usage)

    def _tail(self, usage: Json | None) -> bytes:
        return self._close if usage is None else b',"usage":' + orjson.dumps(usage) + b"}\n\n"


def error_event(error: RequestError) -> bytes:
    """An error after the headers have gone out, and the end of the stream."""
    return b"data: " + orjson.dumps(error_body(error)) + b"\n\n" + DONE


class EventStream:
    """An open stream: `async with await EventStream.open(request, headers, keep_alive, interval) as stream`.

    Once the headers are out, events go to the transport in one call each, without aiohttp's layers in between; its
    protocol still says when the client is behind, and ends the body.

    After `keep_alive_interval_s` without an event `keep_alive` is sent, so that no proxy takes a long prefill for
    a dead connection. 0 sends none.
    """

    def __init__(
        self,
        request: web.Request,
        response: web.StreamResponse,
        writer: AbstractStreamWriter,
        keep_alive: bytes,
        keep_alive_interval_s: float,
    ) -> None:
        self.response = response
        self._writer = writer
        self._protocol = request.protocol
        # HTTP/1.0 knows no chunks; its body ends with the connection.
        self._is_chunked: bool = writer.chunked  # type: ignore[attr-defined]
        self._is_head = request.method == "HEAD"
        self._keep_alive_bytes = keep_alive
        self._interval = keep_alive_interval_s
        self._loop = asyncio.get_running_loop()
        self._written_at = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None

    @classmethod
    async def open(
        cls, request: web.Request, headers: Mapping[str, str], keep_alive: bytes, keep_alive_interval_s: float
    ) -> EventStream:
        """Send the headers of a 200."""
        response = web.StreamResponse(headers=headers)
        writer = await response.prepare(request)
        assert writer is not None
        return cls(request, response, writer, keep_alive, keep_alive_interval_s)

    def send(self, data: bytes) -> bool:
        """Hand whole events to the socket now, or to its buffer. Raises ConnectionError when the client has gone.

        False: the client reads too slowly; before more is sent `drained` must return.
        """
        transport = self._protocol.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("The client has gone.")
        # An empty chunk would end the body.
        if data and not self._is_head:
            if self._is_chunked:
                data = b"%x\r\n%b\r\n" % (len(data), data)
            self._writer.output_size += len(data)
            self._written_at = self._loop.time()
            if TRACERS:
                began = now()
                transport.write(data)
                stretched("sockets", "write", began, len(data))
            else:
                transport.write(data)
        return not self._protocol.writing_paused

    async def drained(self) -> None:
        """Wait while the client reads too slowly; the only place of a stream that waits for it. Raises ConnectionError
        when it has gone."""
        if self._protocol.writing_paused:
            await self._writer.drain()

    async def write(self, data: bytes) -> None:
        """Send whole events and wait while the client reads too slowly. Raises ConnectionError when it has gone."""
        self.send(data)
        await self.drained()

    async def end(self, data: bytes) -> None:
        """The last events, and the end of the body behind them."""
        await self.write(data)
        await self.response.write_eof()

    async def __aenter__(self) -> EventStream:
        if self._interval > 0:
            self._timer = self._loop.call_later(self._interval, self._keep_alive)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _keep_alive(self) -> None:
        if self._loop.time() - self._written_at >= self._interval:
            self._written_at = self._loop.time()
            # One that is behind needs no reminder.
            if not self._protocol.writing_paused:
                try:
                    self.send(self._keep_alive_bytes)
                except ConnectionError:
                    # The handler is about to be cancelled, or to see the same.
                    return
        self._timer = self._loop.call_at(self._written_at + self._interval, self._keep_alive)

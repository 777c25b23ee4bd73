"""Connections: aiohttp's, with bounds on clients that send or read too slowly, and on how many one address has.

What a client does not read waits in the transport's buffer, of 64 KiB at most, and then the answer waits for the
client: a stream's deltas melt into one meanwhile. One that stays so for `write_timeout_s` is cut off, and its request
aborted. Loop thread.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from engine.addresses import household
from engine.config import ServerOptions
from server.protocol.errors import ApiError, error_response

logger = logging.getLogger("oneloop.server")


@dataclass(slots=True)
class Bounds:
    """What all connections of a server have in common. cut: how many were ended, by reason, for the metrics."""

    options: ServerOptions
    by_address: Counter[str] = field(default_factory=Counter)
    cut: Counter[str] = field(default_factory=Counter)


class Connection(web.RequestHandler):
    """What is no HTTP gets a JSON body and no line in the log."""

    __slots__ = ("_address", "_bounds", "_head_timer", "_read_timer")

    def __init__(self, bounds: Bounds, manager: web.Server, **options: Any) -> None:
        super().__init__(manager, **options)
        self._bounds = bounds
        self._address: str | None = None
        self._head_timer: asyncio.TimerHandle | None = None
        self._read_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        bounds, options = self._bounds, self._bounds.options
        self._head_timer = self._loop.call_later(options.header_timeout_s, self._on_no_head)
        peer = transport.get_extra_info("peername")
        # A path of a Unix socket is nobody's address.
        if options.max_connections_per_address and isinstance(peer, tuple):
            self._address = household(str(peer[0]))
            bounds.by_address[self._address] += 1
            if bounds.by_address[self._address] > options.max_connections_per_address:
                self._cut("address")

    def connection_lost(self, exc: BaseException | None) -> None:
        for timer in (self._head_timer, self._read_timer):
            if timer is not None:
                timer.cancel()
        if self._address is not None:
            counts = self._bounds.by_address
            counts[self._address] -= 1
            if not counts[self._address]:
                del counts[self._address]
            self._address = None
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._read_timer = self._loop.call_later(self._bounds.options.write_timeout_s, self._cut, "slow_reader")

    def resume_writing(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
        super().resume_writing()

    def _on_no_head(self) -> None:
        # Later heads of the same connection have aiohttp's keep-alive timeout.
        if not self._request_count:
            self._cut("slow_sender")

    def _cut(self, reason: str) -> None:
        """End the connection now, whatever is under way or waits in its buffer."""
        if self.transport is not None and not self.transport.is_closing():
            self._bounds.cut[reason] += 1
            self.transport.abort()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if status >= 500:
            logger.error("a connection failed", exc_info=exc)
        if request.writer.output_size > 0:
            raise ConnectionError("headers have been sent")
        text = "The request is not valid HTTP." if status < 500 else "The server had an internal error."
        response = error_response(ApiError(status, text))
        response.force_close()
        return response

"""The unchanged web application inside a replica: it listens on a Unix socket of its process, and asks come by that.

A request arrives whole and its answer leaves in pieces, as the application writes them. Who stops reading closes the
connection, which is how the application learns that a client left. Loop thread.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

import aiohttp
from aiohttp import web
from yarl import URL

from engine.config import ServerOptions
from engine.engine import Engine
from server.app import CONNECTION
from server.connection import Bounds, Connection
from server.ray.prefixes import Beginnings
from server.serving import drain
from server.state import STATE

# What one hop says to the next; lower case.
HOP = frozenset(
    {
        *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te"),
        *("trailer", "trailers", "transfer-encoding", "upgrade", "expect", "content-length"),
    }
)
_SKIPPED = ("User-Agent", "Accept", "Accept-Encoding", "Content-Type")

Headers = Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Ask:
    """A request as it came. target: path and query, as they were written. beginnings: for who chooses a replica.
    keeper: the replica that must answer, if one must and is there."""

    method: str
    target: str
    headers: Headers = ()
    body: bytes = b""
    beginnings: Beginnings = field(default_factory=Beginnings)
    keeper: str | None = None


@dataclass(frozen=True, slots=True)
class Head:
    """The first piece of an answer; the others are bytes of its body."""

    status: int
    headers: Headers


Piece = Head | bytes


class Bridge:
    """`await bridge.open()`, then `bridge.answer(ask)` for each request; `await bridge.close()` drains."""

    def __init__(self, app: web.Application, engine: Engine, options: ServerOptions) -> None:
        self._app, self._engine, self._options = app, engine, options
        self._directory = tempfile.TemporaryDirectory(prefix="oneloop-")
        self._path = os.path.join(self._directory.name, "http")
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1.0, access_log=None)
        self._listener: asyncio.Server | None = None
        self._session: aiohttp.ClientSession | None = None

    async def open(self) -> None:
        await self._runner.setup()
        handlers, bounds = self._runner.server, Bounds(self._options)
        assert handlers is not None
        self._engine.metrics.connections_cut = bounds.cut
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_unix_server(
            lambda: Connection(bounds, handlers, loop=loop, **CONNECTION), self._path
        )
        self._session = aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(self._path, limit=0),
            timeout=aiohttp.ClientTimeout(total=None, sock_read=None),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            skip_auto_headers=_SKIPPED,
        )

    async def answer(self, ask: Ask) -> AsyncGenerator[Piece, None]:
        """A Head, then the body. Closing it early is what a client does that leaves."""
        assert self._session is not None
        headers = [(name, value) for name, value in ask.headers if name.lower() not in HOP]
        url = URL("http://replica" + ask.target, encoded=True)
        body = ask.body or None
        async with self._session.request(
            ask.method, url, headers=headers, data=body, allow_redirects=False
        ) as response:
            told = [(name, value) for name, value in response.headers.items() if name.lower() not in HOP]
            if (length := response.headers.get("Content-Length")) is not None:
                told.append(("Content-Length", length))
            yield Head(response.status, told)
            async for piece in response.content.iter_any():
                yield piece

    async def close(self) -> None:
        """Let what was accepted end, for at most drain_timeout_s; then end all connections."""
        await drain(self._engine, self._app[STATE], self._options.drain_timeout_s)
        if self._session is not None:
            await self._session.close()
        if self._listener is not None:
            self._listener.close()
        await self._runner.cleanup()
        self._directory.cleanup()

"""Serving: listening until a signal says stop, or another process takes over; and the drain after it.

`engine/serve.py` calls `serve` with what `build_app` made; the engine's own loop task is started by its caller. Loop
thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import ssl
from collections.abc import Callable
from typing import Any

from aiohttp import web

from engine.config import ServerOptions, StartupError
from engine.engine import Engine
from server.app import CONNECTION, IS_CLOSING
from server.background import JOBS
from server.connection import Bounds, Connection
from server.handover import Offer, path_of, take
from server.state import STATE, State

logger = logging.getLogger("oneloop.server")

# A process that handed its socket over stays for connections that it had accepted and whose requests are on their way.
QUIET_S = 1.0
# A burst of this many connects waits in the kernel and is not refused.
_BACKLOG = 4096


async def serve(
    app: web.Application,
    engine: Engine,
    options: ServerOptions,
    *,
    on_listening: Callable[[str, int], None] | None = None,
    stop: asyncio.Event | None = None,
    on_leaving: Callable[[float], object] = lambda seconds: None,
) -> None:
    """Listen until SIGTERM, SIGINT or `stop`, then drain; a second signal ends the drain at once.

    on_listening: called with the host and the port that is bound (port 0 picks one). on_leaving: with the seconds that
    requests still have, as the drain begins, and with 0 where it is ended. Raises StartupError when the address cannot
    be used. Cancelling this ends all connections.
    """
    loop = asyncio.get_running_loop()
    state = app[STATE]
    stop = stop or asyncio.Event()
    grace = _grace(options.drain_timeout_s)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=grace, access_log=None)
    tls, bounds = make_tls(options), Bounds(options)
    engine.metrics.connections_cut = bounds.cut
    await runner.setup()
    handlers = runner.server
    assert handlers is not None
    listener: asyncio.Server | None = None
    offer: Offer | None = None
    handed_over = asyncio.Event()
    draining: asyncio.Task[None] | None = None
    num_signals = 0

    def on_handed_over() -> None:
        handed_over.set()
        stop.set()

    def on_signal() -> None:
        nonlocal num_signals
        num_signals += 1
        if num_signals > 1 and draining is not None and not draining.done():
            logger.info("a second signal: what still runs ends now")
            draining.cancel()
        stop.set()

    async def leave(listening: asyncio.Server) -> None:
        until = loop.time() + options.drain_timeout_s
        handing: asyncio.Task[None] | None = None
        if handed_over.is_set():
            # The next process accepts from here on. Who is connected here is answered, and told to come anew.
            logger.info("another process has taken over")
            listening.close()
            app[IS_CLOSING].set()
            handing = asyncio.create_task(app[JOBS].hand_over())
        try:
            if handing is not None:
                await _quiet(state, options.drain_timeout_s)
            await drain(engine, state, max(0.0, until - loop.time()))
        finally:
            if handing is not None:
                handing.cancel()

    try:
        path = None if options.handover is None else path_of(options.handover)
        taken = None if path is None else await asyncio.to_thread(take, path)
        where: dict[str, Any] = {"host": options.host, "port": options.port}
        if taken is not None:
            where = {"sock": taken.listening}
        try:
            listener = await loop.create_server(
                lambda: Connection(bounds, handlers, loop=loop, **CONNECTION),
                **where,
                backlog=_BACKLOG,
                ssl=tls,
            )
        except OSError as error:
            why = "the address is in use; --port picks another" if error.errno == errno.EADDRINUSE else error.strerror
            raise StartupError(f"cannot listen on {options.host}:{options.port}: {why}") from None
        if path is not None:
            # A copy: the loop's own socket objects cannot be sent.
            copy = socket.socket(fileno=os.dup(listener.sockets[0].fileno()))
            offer = Offer(path, copy, lambda: loop.call_soon_threadsafe(on_handed_over))
            if taken is not None:
                taken.serving()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal)
        if on_listening is not None:
            on_listening(options.host, listener.sockets[0].getsockname()[1])
        await stop.wait()
        on_leaving(options.drain_timeout_s)
        draining = asyncio.create_task(leave(listener))
        await asyncio.wait({draining})
        if draining.cancelled():
            on_leaving(0.0)
            engine.drain()
        else:
            draining.result()
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
        if draining is not None:
            draining.cancel()
        if offer is not None:
            offer.close()
        if listener is not None:
            listener.close()
        await runner.cleanup()


async def _quiet(state: State, limit: float) -> None:
    """Wait until no request has come for QUIET_S, for at most `limit` seconds."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(limit / 2):
            while True:
                await state.in_flight.idle.wait()
                before = state.in_flight.total
                await asyncio.sleep(min(QUIET_S, limit / 10))
                if state.in_flight.total == before and not state.in_flight.count:
                    return


def make_tls(options: ServerOptions) -> ssl.SSLContext | None:
    """Raises StartupError for files that cannot be used."""
    if options.ssl_certfile is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2

    def no_prompt() -> str:
        raise StartupError("--ssl-keyfile: the private key has a password, which nobody could type")

    try:
        context.load_cert_chain(options.ssl_certfile, options.ssl_keyfile, no_prompt)
    except OSError as error:  # and what ssl raises, which is one
        why = error.strerror if error.errno and not isinstance(error, ssl.SSLError) else "no certificate and key"
        named = options.ssl_certfile + (f" with {options.ssl_keyfile}" if options.ssl_keyfile else "")
        raise StartupError(f"--ssl-certfile: {named} cannot be used: {why}") from None
    return context


def _grace(limit: float) -> float:
    """The last moments of a drain come in four: one for those who are cut short, two of aiohttp's, one to spare."""
    return min(0.25, limit / 20)


async def drain(engine: Engine, state: State, limit: float) -> None:
    """Let what was accepted end, for at most `limit` seconds; new requests meanwhile get their 503."""
    engine.drain()
    grace = _grace(limit)
    if state.in_flight.count:
        logger.info(
            "stopping: requests still running: %d, for at most %.3g s (--drain-timeout); a second signal ends them now",
            state.in_flight.count,
            limit,
        )
    else:
        logger.info("stopping: no requests are running")
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(limit - 4 * grace):
            await engine.drained()
            await state.in_flight.idle.wait()
            return
    # Those who still read get a finish_reason and [DONE]; those who do not are cut off with their connection.
    logger.warning("the drain's time is over; requests that are cut short: %d", state.in_flight.count)
    for request_id in list(state.submitted):
        engine.abort(request_id)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(grace):
            await state.in_flight.idle.wait()

"""GET /health, /ready and /metrics: what probes and scrapers ask. The first two are never authenticated."""

from __future__ import annotations

from aiohttp import web

from server.protocol.errors import ApiError
from server.state import STATE, State


async def health(request: web.Request) -> web.Response:
    """200 while the engine makes progress, not merely while the process lives; empty body."""
    _check(request.app[STATE])
    return web.Response()


async def metrics(request: web.Request) -> web.Response:
    """Prometheus text format 0.0.4."""
    text = request.app[STATE].engine.metrics.render()
    return web.Response(body=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})


def _check(state: State) -> None:
    engine = state.engine
    if engine.failed:
        raise ApiError(503, "The engine has failed.")
    if engine.draining:
        raise ApiError(503, "The server is shutting down.")
    if engine.seconds_since_progress() > state.options.unresponsive_after_s:
        raise ApiError(503, "The engine makes no progress.")


ROUTES = (
    ("GET", "/health", health),
    ("GET", "/ready", health),
    ("GET", "/metrics", metrics),
)

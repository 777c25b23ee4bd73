"""GET /health, /ready, /health_generate and /metrics: what probes and scrapers ask. The first two are never
authenticated."""

from __future__ import annotations

import asyncio
import contextlib

from aiohttp import web

from engine.request import FinishReason, Request, SamplingParams
from server.protocol.errors import ApiError
from server.state import REQUEST_ID, STATE, State

# How long a probe may wait behind others; SGLang's bound.
PROBE_SECONDS = 20.0


async def health(request: web.Request) -> web.Response:
    """200 while the engine makes progress, not merely while the process lives; empty body."""
    _check(request.app[STATE])
    return web.Response()


async def health_generate(request: web.Request) -> web.Response:
    """200 when a token has come out of the model, or within PROBE_SECONDS at least tokens of others; empty body."""
    state = request.app[STATE]
    _check(state)
    if state.engine.is_paused:
        raise ApiError(503, "The engine is paused.")
    sampling = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    probe = Request(f"health-{request[REQUEST_ID]}", [0], sampling, False, priority=-(2**31), fairness_key="health")
    began = state.engine.metrics.generation_tokens
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(PROBE_SECONDS), state.engine.submit(probe) as stream:
            delta = await stream.collect()
            if delta.finish_reason is not FinishReason.LENGTH:
                raise ApiError(503, delta.error or "The probe was aborted.")
            return web.Response()
    if state.engine.metrics.generation_tokens == began:
        raise ApiError(503, f"No token came within {PROBE_SECONDS:g} seconds.")
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
    ("GET", "/health_generate", health_generate),
    ("GET", "/metrics", metrics),
)

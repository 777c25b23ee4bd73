"""GET /health (also /v1/health), /ready, /health_generate and /metrics: what probes and scrapers ask. The first two are
never authenticated."""

from __future__ import annotations

import asyncio
import contextlib

from aiohttp import web

from engine.request import FinishReason, Pooling, QueueFullError, Request, SamplingParams
from server.protocol.errors import ApiError
from server.state import REQUEST_ID, STATE, State

# How long a probe may wait behind others; SGLang's bound.
PROBE_SECONDS = 20.0
_LOOK_SECONDS = 0.05


async def health(request: web.Request) -> web.Response:
    """200 while the engine makes progress, not merely while the process lives; empty body."""
    _check(request.app[STATE])
    return web.Response()


async def health_generate(request: web.Request) -> web.Response:
    """200 when a token has come out of the model (a vector, where it gives no text), or within PROBE_SECONDS at least
    those of others; empty body."""
    state = request.app[STATE]
    _check(state)
    if state.engine.is_paused:
        raise ApiError(503, "The engine is paused.")
    probe = Request(
        f"health-{request[REQUEST_ID]}",
        [0],
        SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True),
        stream=False,
        priority=-(2**31),
        fairness_key="health",
        pooling=None if state.model.abilities.generates else Pooling("last"),
    )
    began = _num_answered(state)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(PROBE_SECONDS):
            if await _answers(state, probe):
                return web.Response()
            # There is no room for it, which says nothing against the model.
            while _num_answered(state) == began:  # noqa: ASYNC110  (tokens of others are no event)
                await asyncio.sleep(_LOOK_SECONDS)
    if _num_answered(state) == began:
        raise ApiError(503, f"Nothing came out of the model within {PROBE_SECONDS:g} seconds.")
    return web.Response()


async def _answers(state: State, probe: Request) -> bool:
    """False where the probe was crowded out: the queue is full, or it waited in it for too long."""
    try:
        async with state.engine.submit(probe) as stream:
            delta = await stream.collect()
    except QueueFullError:
        return False
    if delta.finish_reason is FinishReason.ERROR and delta.status == 503:
        return False
    if delta.finish_reason not in (FinishReason.LENGTH, FinishReason.STOP):
        raise ApiError(503, delta.error or "The probe was aborted.")
    return True


def _num_answered(state: State) -> int:
    """Tokens and vectors so far."""
    metrics = state.engine.metrics
    return metrics.generation_tokens + metrics.finished[FinishReason.STOP]


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
    if engine.seconds_since_progress() > state.options.stall_timeout_s:
        raise ApiError(503, "The engine makes no progress.")


ROUTES = (
    ("GET", "/health", health),
    ("GET", "/v1/health", health),
    ("GET", "/ready", health),
    ("GET", "/health_generate", health_generate),
    ("GET", "/metrics", metrics),
)

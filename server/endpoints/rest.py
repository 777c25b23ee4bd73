"""Pause and sleep, as in vLLM, and SGLang's /update_weights_from_disk: what brings the engine to rest."""

from __future__ import annotations

from aiohttp import web

from engine.config import StartupError
from engine.forward import PARTS
from engine.resting import PAUSE_MODES
from server.directories import take_directory
from server.endpoints.rollouts import UPDATES
from server.protocol.body import invalid, read_body
from server.protocol.errors import ApiError, json_response, without_paths
from server.state import STATE


async def pause(request: web.Request) -> web.Response:
    """`?mode=abort|wait|keep`: see Resting.pause. Requests that come meanwhile wait for /resume. clear_cache=true: what
    is cached is forgotten; whom the pause holds is computed again."""
    mode, clear = _read_mode(request), request.query.get("clear_cache", "false").lower()
    if clear not in ("true", "false"):
        raise invalid("clear_cache", "must be true or false")
    engine = request.app[STATE].engine
    await engine.pause(mode)
    # Asleep it has nothing cached.
    if clear == "true" and not engine.sleep_level and not engine.forget_held():
        raise ApiError(409, "The engine is paused, but pages are being carried: the cache is not cleared.")
    return json_response({"status": "paused"})


async def resume(request: web.Request) -> web.Response:
    """Go on, with the weights that came meanwhile piece by piece; a 4xx where those do not fit."""
    try:
        await request.app[UPDATES].finish_pieces()
    finally:
        await request.app[STATE].engine.resume()
    return json_response({"status": "resumed"})


async def is_paused(request: web.Request) -> web.Response:
    return json_response({"is_paused": request.app[STATE].engine.is_paused})


async def sleep(request: web.Request) -> web.Response:
    """`?level=1|2&mode=abort|wait|keep`: see Resting.sleep."""
    level = request.query.get("level", "1")
    if level not in ("1", "2"):
        raise invalid("level", "must be 1 or 2")
    try:
        await request.app[STATE].engine.sleep(int(level), _read_mode(request))
    except StartupError as error:
        raise ApiError(400, f"The model cannot sleep: {error}") from None
    return web.Response()


async def wake_up(request: web.Request) -> web.Response:
    """`?tags=weights&tags=kv_cache`: parts of it, all where none is named. With its weights alone it takes others and
    serves nobody yet."""
    tags = request.query.getall("tags", PARTS)
    if not set(tags) <= set(PARTS):
        raise invalid("tags", f"must be of {', '.join(PARTS)}")
    try:
        await request.app[STATE].engine.wake_up(tags)
    except StartupError as error:
        raise ApiError(503, f"The model cannot wake up: {without_paths(str(error))}") from None
    return web.Response()


async def is_sleeping(request: web.Request) -> web.Response:
    return json_response({"is_sleeping": request.app[STATE].engine.sleep_level > 0})


async def update_weights(request: web.Request) -> web.Response:
    """`model_path`: a directory of this machine with a checkpoint of the served architecture.

    Without `abort_all_requests` it waits until those that are here have finished. The cache is flushed. A failure is a
    400, and the old weights go on serving.
    """
    engine, body = request.app[STATE].engine, await read_body(request)
    path = body.string("model_path", None, most=4096)
    if path is None:
        raise invalid("model_path", "is required")
    body.choice("load_format", ("auto", "safetensors"))
    if not body.boolean("flush_cache", True):
        raise invalid("flush_cache", "must be true: what is cached was computed with the old weights")
    # Whom a pause holds goes on with them.
    mode = "abort" if body.boolean("abort_all_requests", False) else "keep" if engine.is_paused else "wait"
    version = body.string("weight_version", None, most=128)
    await take_directory(request, path, "model_path", mode, version)
    return json_response({"success": True, "message": "The new weights serve.", "num_paused_requests": 0})


def _read_mode(request: web.Request) -> str:
    mode = request.query.get("mode", "abort")
    if mode not in PAUSE_MODES:
        raise invalid("mode", f"must be one of {', '.join(PAUSE_MODES)}")
    return mode


ROUTES = (
    ("POST", "/pause", pause),
    ("POST", "/resume", resume),
    ("GET", "/is_paused", is_paused),
    ("POST", "/sleep", sleep),
    ("POST", "/wake_up", wake_up),
    ("GET", "/is_sleeping", is_sleeping),
    ("POST", "/update_weights_from_disk", update_weights),
)
IS_ADMIN = True

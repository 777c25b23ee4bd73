"""/start_profile and /stop_profile: a torch profiler trace of what the device does meanwhile."""

from __future__ import annotations

from aiohttp import web

from server.protocol.errors import ApiError, json_response
from server.state import STATE


async def start(request: web.Request) -> web.Response:
    """400 where there is nothing to record with, or nowhere to write to."""
    engine = request.app[STATE].engine
    start_profile = getattr(engine.executor, "start_profile", None)
    directory = engine.config.cuda.profile_dir
    if start_profile is None or directory is None:
        raise ApiError(400, "Profiling needs a CUDA device and a server started with --profile-dir.")
    start_profile(directory)
    return json_response({"success": True, "message": "Recording; /stop_profile writes the trace."})


async def stop(request: web.Request) -> web.Response:
    """Writes the trace; the loop stands still meanwhile. 400 where none is being recorded."""
    executor = request.app[STATE].engine.executor
    if not getattr(executor, "is_profiling", False):
        raise ApiError(400, "No profile is being recorded.")
    path = executor.stop_profile()  # type: ignore[attr-defined]
    return json_response({"success": True, "file": path.name})


ROUTES = (("POST", "/start_profile", start), ("POST", "/stop_profile", stop))
IS_ADMIN = True

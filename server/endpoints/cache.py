"""/flush_cache and /reset_prefix_cache: forget every cached prefix, for benchmarks."""

from __future__ import annotations

from aiohttp import web

from server.protocol.errors import ApiError, json_response
from server.state import STATE


async def flush(request: web.Request) -> web.Response:
    """400 while requests run or wait: their pages are in use."""
    if not request.app[STATE].engine.flush_cache():
        raise ApiError(400, "The cache cannot be flushed while requests run or wait.", code="engine_busy")
    return json_response({"success": True, "message": "The cache is empty."})


ROUTES = tuple((method, path, flush) for path in ("/flush_cache", "/reset_prefix_cache") for method in ("GET", "POST"))
IS_ADMIN = True

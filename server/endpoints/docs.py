"""GET /openapi.json: what this server takes and gives."""

from __future__ import annotations

import functools

import orjson
from aiohttp import web

from server.endpoints.info import version
from server.openapi.document import document
from server.state import STATE


@functools.cache
def _encoded(root_path: str) -> bytes:
    return orjson.dumps(document(version(), root_path))


async def openapi(request: web.Request) -> web.Response:
    """OpenAPI 3.1; the same bytes for as long as the process lives."""
    body = _encoded(request.app[STATE].options.root_path)
    return web.Response(body=body, content_type="application/json")


ROUTES = (("GET", "/openapi.json", openapi),)

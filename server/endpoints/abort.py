"""POST /abort_request (SGLang) and /abort_requests (vLLM): end requests by the names that their clients know."""

from __future__ import annotations

from aiohttp import web

from server.protocol.body import Body, invalid, read_body
from server.protocol.errors import json_response
from server.state import STATE


async def abort(request: web.Request) -> web.Response:
    """`{"rid": ID or a list of them}`, `{"request_ids": [...]}` or `{"abort_all": true}`. No such request is no error:
    it may just have ended. An ID is that of a response, its X-Request-Id, or the `rid` that was sent to /generate."""
    state, body = request.app[STATE], await read_body(request)
    abort_all = body.boolean("abort_all", False)
    wanted = _read_ids(body, "rid") | _read_ids(body, "request_ids")
    if not abort_all and not wanted:
        raise invalid("rid", "is required, unless `abort_all` is true")
    found = [
        one for one, names in state.submitted.items() if abort_all or one in wanted or not wanted.isdisjoint(names)
    ]
    for request_id in found:
        state.engine.abort(request_id)
    return json_response({"success": True, "num_aborted": len(found)})


def _read_ids(body: Body, name: str) -> set[str]:
    value = body.raw(name)
    ids = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(ids, list) or not all(isinstance(one, str) and one for one in ids):
        raise invalid(name, "must be an id or a list of ids")
    return set(ids)


ROUTES = (("POST", "/abort_request", abort), ("POST", "/abort_requests", abort))
IS_ADMIN = True

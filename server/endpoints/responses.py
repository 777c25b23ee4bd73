"""/v1/responses: create a response, and see, list or forget what is kept of one.

Only `background` responses could be cancelled, and this server has none.
"""

from __future__ import annotations

from functools import partial

import orjson
from aiohttp import web

from server.answers.compaction import CompactionAnswer
from server.answers.responses import ResponsesAnswer
from server.endpoints.generate import echo_request_id
from server.protocol.body import Body, invalid, read_body
from server.protocol.chat import encode_messages
from server.protocol.compaction import parse_compaction
from server.protocol.errors import ApiError, json_response
from server.protocol.generation import read_model
from server.protocol.naming import in_words_of
from server.protocol.responses import NAMES, parse_response, read_chat
from server.protocol.tool_fields import read_tools
from server.responder import respond
from server.response_store import Stored
from server.short_forms import with_short_forms
from server.state import CALLER, REQUEST_ID, STATE

_MAX_LISTED = 100


async def create(request: web.Request) -> web.StreamResponse:
    """POST /v1/responses."""
    state, body = request.app[STATE], await read_body(request)
    plan, asked = await parse_response(body, state, f"resp_{request[REQUEST_ID]}", _owner())
    echo_request_id(request, body)
    with in_words_of(NAMES):
        return await respond(request, state, plan, partial(ResponsesAnswer, asked))


async def compact(request: web.Request) -> web.StreamResponse:
    """POST /v1/responses/compact."""
    state, body = request.app[STATE], await read_body(request)
    plan, asked = await parse_compaction(body, state, f"resp_{request[REQUEST_ID]}", _owner())
    with in_words_of(NAMES):
        return await respond(request, state, plan, partial(CompactionAnswer, asked))


async def count_input_tokens(request: web.Request) -> web.Response:
    """POST /v1/responses/input_tokens: what the same body would be charged for its input."""
    state, body = request.app[STATE], await read_body(request)
    read_model(body, state.model)
    chat, _ = read_chat(body, state, _owner())
    with in_words_of(NAMES):
        _, tokens = await encode_messages(chat, state, read_tools(chat))
    return json_response({"object": "response.input_tokens", "input_tokens": len(tokens)})


async def retrieve(request: web.Request) -> web.Response:
    """GET /v1/responses/{id}."""
    stored = _find(request)
    if request.query.get("stream", "false") != "false":
        raise invalid("stream", "is not supported here: only `background` responses could be streamed again")
    return web.Response(body=stored.response, content_type="application/json")


async def delete(request: web.Request) -> web.Response:
    """DELETE /v1/responses/{id}."""
    _find(request)
    name = request.match_info["response_id"]
    request.app[STATE].responses.delete(_owner(), name)
    return json_response({"id": name, "object": "response", "deleted": True})


async def cancel(request: web.Request) -> web.Response:
    """POST /v1/responses/{id}/cancel: what is kept here has ended."""
    _find(request)
    raise invalid("response_id", "is of a response that was not made with `background`, and those cannot be cancelled")


async def list_input_items(request: web.Request) -> web.Response:
    """GET /v1/responses/{id}/input_items, those of earlier turns included, a page at a time."""
    items = orjson.loads(_find(request).input)
    query = Body(dict(request.query))
    limit = query.raw("limit") or "20"
    if not (limit.isascii() and limit.isdecimal() and len(limit) <= 3 and 1 <= int(limit) <= _MAX_LISTED):
        raise invalid("limit", f"must be an integer from 1 to {_MAX_LISTED}")
    if query.has("before"):
        raise invalid("before", "is not supported by this server; use `after` with the other `order`")
    if (query.choice("order", ("asc", "desc")) or "desc") == "desc":
        items.reverse()
    if (after := query.raw("after")) is not None:
        places = [place for place, item in enumerate(items) if item["id"] == after]
        if not places:
            raise invalid("after", "names no input item of this response")
        items = items[places[0] + 1 :]
    page = items[: int(limit)]
    return json_response(
        {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": len(page) < len(items),
        }
    )


def _find(request: web.Request) -> Stored:
    """Raises the 404, also for a response of somebody else."""
    name = request.match_info["response_id"]
    stored = request.app[STATE].responses.get(_owner(), name)
    if stored is None:
        raise ApiError(404, f"Response with id {name[:64]!r} not found.", param="response_id")
    return stored


def _owner() -> str:
    """Whose responses these are: the caller's key."""
    return CALLER.get().key


ROUTES = with_short_forms(
    (
        ("POST", "/v1/responses", create),
        ("POST", "/v1/responses/input_tokens", count_input_tokens),
        ("POST", "/v1/responses/compact", compact),
        ("GET", "/v1/responses/{response_id}", retrieve),
        ("DELETE", "/v1/responses/{response_id}", delete),
        ("POST", "/v1/responses/{response_id}/cancel", cancel),
        ("GET", "/v1/responses/{response_id}/input_items", list_input_items),
    )
)

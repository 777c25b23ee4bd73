"""POST /v1/chat/completions and /v1/completions: read, plan, respond."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable

from aiohttp import web

from server.protocol.body import Body, read_body
from server.protocol.chat import parse_chat
from server.protocol.completions import parse_completion
from server.protocol.generation import Plan
from server.protocol.naming import in_words_of
from server.responder import respond
from server.short_forms import with_short_forms
from server.state import ECHOED_ID, ID_PATTERN, REQUEST_ID, STATE, State

Parser = Callable[[Body, State, str], Awaitable[Plan]]


async def chat_completions(request: web.Request) -> web.StreamResponse:
    # What the engine says of a prompt is about the messages that became it.
    with in_words_of({"prompt": "messages"}):
        return await _generate(request, parse_chat, "chatcmpl-")


async def completions(request: web.Request) -> web.StreamResponse:
    return await _generate(request, parse_completion, "cmpl-")


async def _generate(request: web.Request, parse: Parser, prefix: str) -> web.StreamResponse:
    state = request.app[STATE]
    body = await read_body(request)
    plan = await parse(body, state, prefix + request[REQUEST_ID])
    echo_request_id(request, body)
    return await respond(request, state, plan)


def echo_request_id(request: web.Request, body: Body) -> None:
    """A body's `request_id`, which has been checked, is another spelling of X-Request-Id; the header wins."""
    own = body.raw("request_id")
    if own is not None and "X-Request-Id" not in request.headers and re.fullmatch(ID_PATTERN, own):
        request[ECHOED_ID] = own


ROUTES = with_short_forms(
    (
        ("POST", "/v1/chat/completions", chat_completions),
        ("POST", "/v1/completions", completions),
    )
)

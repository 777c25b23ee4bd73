"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API, for agents and clients that speak it."""

from __future__ import annotations

from functools import partial

from aiohttp import web

from server.answers.anthropic import AnthropicAnswer
from server.protocol.anthropic import NAMES, count_tokens, error_body, parse_messages
from server.protocol.body import read_body
from server.protocol.errors import json_response
from server.protocol.naming import in_words_of
from server.responder import respond
from server.short_forms import with_short_forms
from server.state import REQUEST_ID, STATE


async def messages(request: web.Request) -> web.StreamResponse:
    state = request.app[STATE]
    body = await read_body(request)
    with in_words_of(NAMES):
        plan, wanted = await parse_messages(body, state, "msg_" + request[REQUEST_ID])
        return await respond(request, state, plan, partial(AnthropicAnswer, wanted=wanted))


async def count(request: web.Request) -> web.Response:
    """How many tokens a prompt takes, without the answer."""
    body = await read_body(request)
    with in_words_of(NAMES):
        return json_response({"input_tokens": await count_tokens(body, request.app[STATE])})


ROUTES = with_short_forms(
    (
        ("POST", "/v1/messages", messages),
        ("POST", "/v1/messages/count_tokens", count),
    )
)
ERROR_SHAPE = error_body

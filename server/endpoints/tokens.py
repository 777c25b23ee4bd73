"""POST /inference/v1/generate: vLLM's tokens in, tokens out, for trainers and for routers that tokenize themselves."""

from __future__ import annotations

from functools import partial

from aiohttp import web

from server.answers.tokens import TokensAnswer
from server.endpoints.generate import echo_request_id
from server.protocol.body import read_body
from server.protocol.tokens import parse_tokens
from server.responder import respond
from server.state import REQUEST_ID, STATE


async def generate(request: web.Request) -> web.StreamResponse:
    state = request.app[STATE]
    body = await read_body(request)
    plan = await parse_tokens(body, state, "cmpl-" + request[REQUEST_ID])
    echo_request_id(request, body)
    given = body.string("request_id", None, most=128)
    return await respond(request, state, plan, partial(TokensAnswer, request_id=given or request[REQUEST_ID]))


ROUTES = (("POST", "/inference/v1/generate", generate),)

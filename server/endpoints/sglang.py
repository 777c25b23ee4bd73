"""POST /generate: SGLang's native API, for its benchmark and for training loops that drive it."""

from __future__ import annotations

from functools import partial

from aiohttp import web

from server.answers.sglang import SGLangAnswer
from server.protocol.body import read_body
from server.protocol.naming import in_words_of
from server.protocol.sglang import parse_generate
from server.responder import respond
from server.state import REQUEST_ID, STATE


async def generate(request: web.Request) -> web.StreamResponse:
    state = request.app[STATE]
    body = await read_body(request)
    plan, wanted = await parse_generate(body, state, request[REQUEST_ID])
    # One id for all prompts, as it was before it was numbered.
    given = body.raw("rid") if isinstance(body.raw("rid"), str) else None
    rids = [tuple(filter(None, (rid, given))) for rid in wanted.rids]
    with in_words_of(wanted.names):
        return await respond(request, state, plan, partial(SGLangAnswer, wanted=wanted), rids)


ROUTES = (("POST", "/generate", generate),)

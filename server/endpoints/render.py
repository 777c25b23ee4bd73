"""POST /v1/chat/completions/render (vLLM) and /apply-template (llama.cpp): the exact prompt of a chat, unanswered."""

from __future__ import annotations

from aiohttp import web

from server.protocol.body import read_body
from server.protocol.chat import encode_messages
from server.protocol.errors import json_response
from server.protocol.generation import read_model
from server.protocol.tool_fields import read_tools
from server.short_forms import with_short_forms
from server.state import STATE


async def render(request: web.Request) -> web.Response:
    """The text that the chat template makes of a chat's body, and its token ids."""
    state, body = request.app[STATE], await read_body(request)
    model = read_model(body, state.model)
    text, tokens = await encode_messages(body, state, read_tools(body))
    return json_response({"model": model, "prompt": text, "token_ids": list(tokens)})


ROUTES = with_short_forms(tuple(("POST", path, render) for path in ("/v1/chat/completions/render", "/apply-template")))

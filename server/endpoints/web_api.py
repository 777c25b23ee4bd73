"""GET /web/api/config, POST /web/api/render: what the pages ask for beside everybody's routes. These need the key."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import orjson
from aiohttp import web

from server.endpoints.info import version
from server.openapi.openai import SCHEMAS
from server.protocol.body import invalid, read_body
from server.protocol.errors import ApiError, json_response
from server.rendering.renderer import BusyError, RenderError
from server.state import STATE

# Left out by --no-web (server/app.py).
IS_WEB = True

# Characters. The page sends the end of an answer from its last block on.
MAX_TEXT = 32_000
MAX_BEFORE = 20_000
KINDS = ("fence", "table", "ul", "ol", "paragraph")
# What the page has a control for, in this order; what a control may hold is what the API says it takes.
_CONTROLS = (
    *("temperature", "top_p", "top_k", "min_p", "max_completion_tokens", "seed"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "stop", "min_tokens"),
    *("ignore_eos", "skip_special_tokens", "reasoning_effort", "thinking_token_budget"),
)
_OF_REASONING = ("reasoning_effort", "thinking_token_budget")


@functools.cache
def _controls() -> dict[str, dict[str, Any]]:
    """Each field's schema in the document that /openapi.json is, without the null."""
    fields = SCHEMAS["ChatRequest"]["properties"]
    return {name: fields[name]["anyOf"][0] for name in _CONTROLS}


async def config(request: web.Request) -> web.Response:
    """The model, and the fields of a chat that it can be asked with."""
    state = request.app[STATE]
    # A page has been opened.
    state.renderer.warm()
    reasons = state.reasoning_family is not None
    defaults = dataclasses.asdict(state.model.generation_defaults)
    controls = [
        {"name": name, "schema": schema, "default": defaults.get(name)}
        for name, schema in _controls().items()
        if reasons or name not in _OF_REASONING
    ]
    return json_response(
        {
            "version": version(),
            "models": state.model.names,
            "max_model_len": state.model.max_model_len,
            "chats": state.model.abilities.generates and state.model.chat_template is not None,
            "tools": state.tool_family is not None,
            "reasons": reasons,
            "images": False,
            "controls": controls,
        }
    )


async def render(request: web.Request) -> web.Response:
    """Markdown as blocks of HTML (server/rendering/markdown.py), made beside the loop."""
    body = await read_body(request)
    text = body.string("text", None)
    if text is None:
        raise invalid("text", "is required")
    if len(text) > MAX_TEXT:
        raise invalid("text", f"must have at most {MAX_TEXT} characters")
    before = body.string("before", "")
    if len(before) > MAX_BEFORE:
        raise invalid("before", f"must have at most {MAX_BEFORE} characters")
    state = {"kind": body.choice("kind", ("", *KINDS)) or "", "before": before}
    asked = {"text": text, "state": state, "final": body.boolean("final", False)}
    try:
        made = await request.app[STATE].renderer.render(orjson.dumps(asked))
    except RenderError:
        raise invalid("text", "could not be rendered") from None
    except BusyError:
        raise ApiError(503, "Too many texts are being rendered.") from None
    return web.Response(body=made, content_type="application/json")


ROUTES = (("GET", "/web/api/config", config), ("POST", "/web/api/render", render))

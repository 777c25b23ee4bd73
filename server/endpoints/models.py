"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from aiohttp import web

from server.protocol.errors import json_response
from server.protocol.generation import unknown_model
from server.state import STATE, ServedModel


async def list_models(request: web.Request) -> web.Response:
    model = request.app[STATE].model
    return json_response({"object": "list", "data": [_card(model, name) for name in model.names]})


async def get_model(request: web.Request) -> web.Response:
    model, name = request.app[STATE].model, request.match_info["id"]
    if name not in model.names:
        raise unknown_model(name)
    return json_response(_card(model, name))


def _card(model: ServedModel, name: str) -> dict[str, object]:
    return {
        "id": name,
        "object": "model",
        "created": model.created,
        # Routers pick their mode by this word; it is ours and nobody else's.
        "owned_by": "oneloop",
        "root": model.names[0],
        "parent": None,
        "max_model_len": model.max_model_len,
    }


ROUTES = (
    ("GET", "/v1/models", list_models),
    # Ids of hub models hold slashes.
    ("GET", "/v1/models/{id:.+}", get_model),
)

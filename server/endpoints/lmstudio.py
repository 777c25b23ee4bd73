"""GET /api/v0/models and /api/v1/models: what LM Studio's clients ask about the model before they use OpenAI's API."""

from __future__ import annotations

from aiohttp import web

from server.endpoints.ollama import parameter_size
from server.protocol.errors import json_response
from server.protocol.generation import unknown_model
from server.state import STATE, State

_PUBLISHER = "oneloop"


async def list_old(request: web.Request) -> web.Response:
    """The older API."""
    state = request.app[STATE]
    return json_response({"object": "list", "data": [_old_card(state, name) for name in state.model.names]})


async def get_old(request: web.Request) -> web.Response:
    state, name = request.app[STATE], request.match_info["id"].rstrip("/")
    if not state.model.knows(name):
        raise unknown_model(name, state.model)
    return json_response(_old_card(state, name))


async def list_models(request: web.Request) -> web.Response:
    """The newer one."""
    state = request.app[STATE]
    return json_response({"models": [_card(state, name) for name in state.model.names]})


def _kind(state: State) -> str:
    return "llm" if state.model.abilities.generates else "embedding"


def _old_card(state: State, name: str) -> dict[str, object]:
    model, config = state.model, state.model.model_config
    return {
        "id": name,
        "object": "model",
        "type": _kind(state) + ("s" if _kind(state) == "embedding" else ""),
        "publisher": _PUBLISHER,
        "arch": config.architecture,
        "compatibility_type": model.checkpoint.format,
        "quantization": model.checkpoint.type,
        "state": "loaded",
        "max_context_length": model.max_model_len,
        "loaded_context_length": model.max_model_len,
        "capabilities": ["tool_use"] if state.tool_family is not None else [],
    }


def _card(state: State, name: str) -> dict[str, object]:
    model, config = state.model, state.model.model_config
    stored = model.checkpoint
    return {
        "type": _kind(state),
        "publisher": _PUBLISHER,
        "key": name,
        "display_name": name,
        "architecture": config.architecture,
        "quantization": {"name": stored.type, "bits_per_weight": round(8 * stored.size / config.num_parameters, 2)},
        "size_bytes": stored.size,
        "params_string": parameter_size(config),
        "loaded_instances": [{"id": name, "config": {"context_length": model.max_model_len}}],
        "max_context_length": model.max_model_len,
        "format": stored.format,
        "capabilities": {"vision": False, "trained_for_tool_use": state.tool_family is not None},
        "description": None,
    }


ROUTES = (
    ("GET", "/api/v0/models", list_old),
    ("GET", "/api/v0/models/{id:.+}", get_old),
    ("GET", "/api/v1/models", list_models),
)

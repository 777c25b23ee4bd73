"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

import datetime

from aiohttp import web

from server.adapters import adapter_name
from server.protocol.body import Body, invalid
from server.protocol.errors import json_response
from server.protocol.generation import unknown_model
from server.short_forms import with_short_forms
from server.state import STATE, ServedModel

# Of Anthropic's pages.
_LISTED = 20
_MAX_LISTED = 1000


async def list_models(request: web.Request) -> web.Response:
    model = request.app[STATE].model
    if not _asks_anthropic(request):
        return json_response({"object": "list", "data": [_card(model, name) for name in _names(model)]})
    names, has_more = _page(request, _names(model))
    return json_response(
        {
            "data": [_anthropic_card(model, name) for name in names],
            "has_more": has_more,
            "first_id": names[0] if names else None,
            "last_id": names[-1] if names else None,
        }
    )


def _names(model: ServedModel) -> list[str]:
    """The model's, and its adapters'."""
    adapters = [] if model.adapters is None else [entry.name for entry in model.adapters.entries]
    return [*model.names, *adapters]


def _page(request: web.Request, names: list[str]) -> tuple[list[str], bool]:
    """`limit` of the names, from the start, behind `after_id` or before `before_id`; and whether there are more on that
    side."""
    query = Body(dict(request.query))
    limit = query.string("limit", str(_LISTED))
    if not (limit.isascii() and limit.isdecimal() and len(limit) <= 4 and 1 <= int(limit) <= _MAX_LISTED):
        raise invalid("limit", f"must be an integer from 1 to {_MAX_LISTED}")
    after, before = query.string("after_id", None), query.string("before_id", None)
    if after is not None and before is not None:
        raise invalid("before_id", "cannot be combined with `after_id`")
    for name, value in (("after_id", after), ("before_id", before)):
        if value is not None and value not in names:
            raise invalid(name, "names no model of this server")
    if before is not None:
        names = names[: names.index(before)]
        return names[-int(limit) :], len(names) > int(limit)
    if after is not None:
        names = names[names.index(after) + 1 :]
    return names[: int(limit)], len(names) > int(limit)


async def get_model(request: web.Request) -> web.Response:
    model, name = request.app[STATE].model, request.match_info["id"].rstrip("/")
    if not model.knows(name) and adapter_name(name, model) is None:
        raise unknown_model(name, model)
    return json_response((_anthropic_card if _asks_anthropic(request) else _card)(model, name))


def _asks_anthropic(request: web.Request) -> bool:
    """Anthropic's clients ask the same path, and say who they are."""
    return "anthropic-version" in request.headers


def _anthropic_card(model: ServedModel, name: str) -> dict[str, object]:
    created = datetime.datetime.fromtimestamp(model.created, datetime.UTC)
    return {
        "type": "model",
        "id": name,
        "display_name": name,
        "created_at": created.isoformat().replace("+00:00", "Z"),
        "max_input_tokens": model.max_model_len,
        "max_tokens": model.max_model_len,
    }


def _card(model: ServedModel, name: str) -> dict[str, object]:
    """The context's length under every name that clients look for it: vLLM's, OpenRouter's, LM Studio's, Anthropic's,
    llama.cpp's."""
    context, adapter = model.max_model_len, adapter_name(name, model)
    entry = model.adapters.find(adapter) if model.adapters is not None and adapter is not None else None
    return {
        "id": name,
        "object": "model",
        "created": model.created if entry is None else entry.loaded_at,
        # Routers pick their mode by this word; it is ours and nobody else's.
        "owned_by": "oneloop",
        "root": model.names[0] if entry is None else str(entry.path),
        "parent": None if adapter is None else model.names[0] if entry is None else entry.base or model.names[0],
        "max_model_len": context,
        "context_length": context,
        "max_context_length": context,
        "max_input_tokens": context,
        "max_tokens": context,
        "max_output_tokens": context,
        "meta": {
            "n_ctx": context,
            "n_ctx_train": model.model_config.max_position_embeddings,
            "n_vocab": model.model_config.vocab_size,
            "n_params": model.model_config.num_parameters,
        },
    }


ROUTES = with_short_forms(
    (
        ("GET", "/v1/models", list_models),
        # Ids of hub models hold slashes.
        ("GET", "/v1/models/{id:.+}", get_model),
    )
)

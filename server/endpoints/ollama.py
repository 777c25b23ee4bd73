"""Ollama's API: answers and embeddings, what its clients ask about the model before, and what only Ollama itself does
with models."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from functools import partial

import orjson
from aiohttp import web

from engine.models.spec import ModelSpec
from engine.text.infill import Infill
from server.answers.ollama import OllamaAnswer, iso_time, nanoseconds
from server.pooling import pool, shaped, written
from server.protocol.body import read_body
from server.protocol.embeddings import EmbeddingPlan
from server.protocol.errors import ApiError, json_response
from server.protocol.naming import in_words_of
from server.protocol.ollama import (
    CHAT_NAMES,
    EMBED_NAMES,
    GENERATE_NAMES,
    OLD_EMBED_NAMES,
    Wanted,
    error_body,
    parse,
    parse_embed,
    parse_old_embed,
    read_name,
    wants_unloading,
)
from server.protocol.refusals import refuse
from server.responder import respond
from server.state import REQUEST_ID, STATE, ServedModel, State

# The release of Ollama whose API this is: clients compare it with what they need. VS Code wants 0.6.4 (tools and
# capabilities), Codex 0.13.4 (/v1/responses), and with 0.14.0 came /v1/messages. Our own version is at /version.
API_VERSION = "0.14.0"
_ONE_MODEL = "This server serves the model that it was started with, and no others."
_DONE = b'{"status":"success"}\n'
# A model that is never unloaded.
_NEVER = "9999-12-31T23:59:59Z"


async def chat(request: web.Request) -> web.StreamResponse:
    return await _answer(request, chat=True)


async def generate(request: web.Request) -> web.StreamResponse:
    return await _answer(request, chat=False)


async def _answer(request: web.Request, *, chat: bool) -> web.StreamResponse:
    state = request.app[STATE]
    started_at = state.engine.clock.now()
    body = await read_body(request, any_type=True)
    with in_words_of(CHAT_NAMES if chat else GENERATE_NAMES):
        plan = await parse(body, state, request[REQUEST_ID], chat=chat)
        name, _ = read_name(body, state.model)
        unload = wants_unloading(body)
        if plan is not None:
            return await respond(request, state, plan, partial(OllamaAnswer, wanted=Wanted(name, chat, started_at)))
    said = {"message": {"role": "assistant", "content": ""}} if chat else {"response": ""}
    now = iso_time(time.time())
    reason = "unload" if unload else "load"
    return json_response({"model": name, "created_at": now, **said, "done": True, "done_reason": reason})


async def embed(request: web.Request) -> web.Response:
    """The vectors of texts."""
    state = request.app[STATE]
    started_at = state.engine.clock.now()
    body = await read_body(request, any_type=True)
    with in_words_of(EMBED_NAMES):
        plan = await parse_embed(body, state)
        name, _ = read_name(body, state.model)
        if plan is None:
            return json_response({"model": name, "embeddings": []})
        parsed_at = state.engine.clock.now()
        vectors = await _embed(request, plan)
    return json_response(
        {
            "model": name,
            "embeddings": vectors,
            "total_duration": nanoseconds(state.engine.clock.now() - started_at),
            "load_duration": nanoseconds(parsed_at - started_at),
            "prompt_eval_count": sum(map(len, plan.prompts)),
        }
    )


async def old_embed(request: web.Request) -> web.Response:
    """The vector of one text."""
    body = await read_body(request, any_type=True)
    with in_words_of(OLD_EMBED_NAMES):
        plan = await parse_old_embed(body, request.app[STATE])
        vectors = [] if plan is None else await _embed(request, plan)
    return json_response({"embedding": vectors[0] if vectors else []})


async def _embed(request: web.Request, plan: EmbeddingPlan) -> list[orjson.Fragment]:
    vectors = await pool(request, f"embd-{request[REQUEST_ID]}", plan.prompts, plan.pooling, plan.terms)
    return await written(vectors, lambda _, vector: shaped(vector, plan.dimensions, normalize=plan.normalize))


async def tags(request: web.Request) -> web.Response:
    """The models that there are."""
    state = request.app[STATE]
    can = {"capabilities": _capabilities(state)}
    return json_response({"models": [card | can for card in _cards(state.model)]})


async def running(request: web.Request) -> web.Response:
    """The models that are loaded: the same, for ever."""
    state = request.app[STATE]
    # As /start_profile does: only a GPU's executor can.
    on_gpu = hasattr(state.engine.executor, "start_profile")
    cards = [
        card
        | {
            "expires_at": _NEVER,
            "size_vram": card["size"] if on_gpu else 0,
            "context_length": state.model.max_model_len,
        }
        for card in _cards(state.model)
    ]
    return json_response({"models": cards})


async def show(request: web.Request) -> web.Response:
    """What the model is and can do."""
    state, body = request.app[STATE], await read_body(request, any_type=True)
    refuse(body, {"verbose": (False,), "system": ("",), "template": ("",), "options": ({},)})
    _, name = read_name(body, state.model)
    model, config = state.model, state.model.model_config
    defaults = dataclasses.asdict(model.generation_defaults)
    kind = config.architecture
    return json_response(
        {
            "modelfile": f"FROM {name}\n",
            "parameters": "\n".join(f"{key} {value}" for key, value in defaults.items() if value not in (None, ())),
            "template": "" if model.chat_template is None else model.chat_template.source,
            "details": _details(model),
            "model_info": {
                "general.architecture": kind,
                "general.parameter_count": config.num_parameters,
                f"{kind}.context_length": model.max_model_len,
                f"{kind}.embedding_length": config.hidden_size,
                f"{kind}.block_count": config.num_layers,
                f"{kind}.attention.head_count": config.num_heads,
                f"{kind}.attention.head_count_kv": config.num_kv_heads,
                f"{kind}.vocab_size": config.vocab_size,
            },
            "capabilities": _capabilities(state),
            "modified_at": iso_time(model.created),
        }
    )


async def pull(request: web.Request) -> web.Response:
    """Done, for a model that is here. Others do not come: the 404."""
    state, body = request.app[STATE], await read_body(request, any_type=True)
    streams = body.boolean("stream", True)
    try:
        read_name(body, state.model)
    except ApiError as error:
        raise ApiError(error.status, f"{error} {_ONE_MODEL}", param=error.param) from None
    response = json_response({"status": "success"})
    if streams:
        response = web.Response(body=_DONE, content_type="application/x-ndjson")
    return response


async def unsupported(request: web.Request) -> web.Response:
    """What Ollama does with its store of models. The body, which may be a whole model, is not read."""
    raise ApiError(400, f"{_ONE_MODEL} It creates, copies, pushes and deletes none.")


async def version(request: web.Request) -> web.Response:
    """The version of the API, and not of this server."""
    return json_response({"version": API_VERSION})


def _capabilities(state: State) -> list[str]:
    abilities, can = state.model.abilities, []
    if abilities.generates:
        can.append("completion")
        if state.tool_family is not None:
            can.append("tools")
        if state.reasoning_family is not None:
            can.append("thinking")
        if state.engine.tokenizer is not None and Infill.find(state.engine.tokenizer) is not None:
            can.append("insert")
    if abilities.embedding is not None:
        can.append("embedding")
    return can


def _cards(model: ServedModel) -> list[dict[str, object]]:
    config = model.model_config
    # Clients tell models apart by it; of the configuration, because nobody reads the weights for this.
    digest = hashlib.sha256(f"{model.names[0]} {config}".encode()).hexdigest()
    return [
        {
            "name": name,
            "model": name,
            "modified_at": iso_time(model.created),
            "size": model.checkpoint.size,
            "digest": digest,
            "details": _details(model),
        }
        for name in model.names
    ]


def parameter_size(config: ModelSpec) -> str:
    """As in names of models: 4.3M, 1.2B."""
    millions = config.num_parameters / 1e6
    return f"{millions / 1000:.1f}B" if millions >= 1000 else f"{millions:.1f}M"


def _details(model: ServedModel) -> dict[str, object]:
    config = model.model_config
    return {
        "parent_model": "",
        "format": model.checkpoint.format,
        "family": config.architecture,
        "families": [config.architecture],
        "parameter_size": parameter_size(config),
        "quantization_level": model.checkpoint.type,
    }


ROUTES = (
    ("POST", "/api/chat", chat),
    ("POST", "/api/generate", generate),
    ("POST", "/api/embed", embed),
    ("POST", "/api/embeddings", old_embed),
    ("GET", "/api/tags", tags),
    ("GET", "/api/ps", running),
    ("POST", "/api/show", show),
    ("GET", "/api/version", version),
    ("POST", "/api/pull", pull),
    ("POST", "/api/create", unsupported),
    ("POST", "/api/copy", unsupported),
    ("POST", "/api/push", unsupported),
    ("DELETE", "/api/delete", unsupported),
    ("POST", "/api/blobs/{digest}", unsupported),
)
ERROR_SHAPE = error_body

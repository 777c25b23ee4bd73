"""GET /, /version, /server_info, /model_info and /load: what this server is and what it is doing."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata

from aiohttp import web

from server.endpoints import web as pages
from server.endpoints.rollouts import backend
from server.protocol.errors import json_response
from server.state import STATE, State


@functools.cache
def version() -> str:
    """The installed version; a checkout that was never installed has none."""
    try:
        return importlib.metadata.version("oneloop")
    except importlib.metadata.PackageNotFoundError:
        return "0.0.0"


async def root(request: web.Request) -> web.Response:
    """The chat page for a browser, a few words for programs."""
    if pages.wants_page(request):
        return pages.send(request, pages.PAGES["/"])
    return json_response({"name": "oneloop", "version": version(), "models": request.app[STATE].model.names})


async def get_version(request: web.Request) -> web.Response:
    return json_response({"version": version()})


async def server_info(request: web.Request) -> web.Response:
    """Resolved options as they were at start, and the engine's state as it is now."""
    state = request.app[STATE]
    stats = dataclasses.asdict(state.engine.stats())
    live = {"stats": stats, "draining": state.engine.draining, "requests_in_flight": state.in_flight.count}
    model = {"model": state.model.names[0], "max_model_len": state.model.max_model_len}
    if state.kv_events is not None:
        live["kv_events"] = state.kv_events.announced()
    engine = state.engine
    live |= {"kv_tiers": engine.tier.describe()} if engine.tier is not None else {}
    live |= {"kv_transfer": engine.transfer.describe()} if engine.transfer is not None else {}
    if request.query.get("config_format") == "json":
        live["vllm_config"] = _vllm_config(state, backend(request.app))
    return json_response({"version": version()} | model | state.model.server_info | live)


def _vllm_config(state: State, known: str) -> dict[str, object]:
    """vLLM's, as far as trainers look: whether weights can come, and over what; their type; and adapters."""
    config, started = state.engine.config, state.model.server_info.get("start_up")
    dtype = started.get("dtype") if isinstance(started, dict) else None
    lora = {"max_loras": config.lora.max_loras, "max_lora_rank": config.lora.max_lora_rank}
    return {
        "weight_transfer_config": None if state.engine.weights_directory is None else {"backend": known},
        "model_config": {
            "model": config.model.path or state.model.names[0],
            "dtype": None if dtype is None else f"torch.{dtype}",
            "max_model_len": state.model.max_model_len,
            "logprobs_mode": config.logprobs.mode,
        },
        "lora_config": lora if config.lora.enable else None,
        # Of one process, whatever computes in it.
        "parallel_config": {"data_parallel_size": 1, "tensor_parallel_size": config.tensor_parallel_size},
    }


async def kv_event_sources(request: web.Request) -> web.Response:
    """vLLM's: where KV events are published; an empty list where they are not."""
    events = request.app[STATE].kv_events
    return json_response([] if events is None else events.sources())


async def model_info(request: web.Request) -> web.Response:
    """SGLang's shape."""
    state = request.app[STATE]
    options, defaults = state.engine.config.model, dataclasses.asdict(state.model.generation_defaults)
    preferred = {
        name: defaults[name]
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        if defaults[name] is not None
    }
    return json_response(
        {
            "model_path": options.path or state.model.names[0],
            "tokenizer_path": options.tokenizer_path or options.path or state.model.names[0],
            "is_generation": state.model.abilities.generates,
            "preferred_sampling_params": preferred or None,
            "weight_version": state.engine.weight_version,
            "has_image_understanding": False,
            "has_audio_understanding": False,
            "max_model_len": state.model.max_model_len,
        }
    )


async def load(request: web.Request) -> web.Response:
    stats = request.app[STATE].engine.stats()
    return json_response({"server_load": stats.num_running + stats.num_waiting})


ROUTES = (
    ("GET", "/", root),
    ("GET", "/v1", root),
    ("GET", "/version", get_version),
    ("GET", "/server_info", server_info),
    ("GET", "/get_server_info", server_info),
    ("GET", "/model_info", model_info),
    ("GET", "/get_model_info", model_info),
    ("GET", "/load", load),
    ("GET", "/kv_event_sources", kv_event_sources),
)

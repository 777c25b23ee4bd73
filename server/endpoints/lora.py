"""LoRA adapters by vLLM's two routes, which answer with a line of text, and SGLang's two, with an object."""

from __future__ import annotations

import re
from collections.abc import Awaitable

from aiohttp import web

from engine.lora.store import MAX_PATH, AdapterStore, Entry
from engine.lora.words import AdapterError
from engine.request import RequestError, UnavailableError
from server.protocol.body import Body, invalid, read_body
from server.protocol.errors import ApiError, json_response
from server.state import STATE, State

_PATH = re.compile(r"(?<![\w.])/[^\s:,;]*")


async def load(request: web.Request) -> web.Response:
    """vLLM's. With `load_inplace` a name that is taken gets the new weights; who is here ends with the old."""
    entry = await _load(request.app[STATE], await read_body(request, prepares=False))
    return web.Response(text=f"Success: LoRA adapter '{entry.name}' added successfully.")


async def unload(request: web.Request) -> web.Response:
    """vLLM's. Returns when the last request with it has ended."""
    entry = await _unload(request.app[STATE], await read_body(request, prepares=False))
    return web.Response(text=f"Success: LoRA adapter '{entry.name}' removed successfully.")


async def sglang_load(request: web.Request) -> web.Response:
    """SGLang's, which takes vLLM's `load_inplace`, too."""
    state, body = request.app[STATE], await read_body(request, prepares=False)
    return await _in_an_object(state, _load(state, body))


async def sglang_unload(request: web.Request) -> web.Response:
    """SGLang's."""
    state, body = request.app[STATE], await read_body(request, prepares=False)
    return await _in_an_object(state, _unload(state, body))


async def _in_an_object(state: State, work: Awaitable[Entry]) -> web.Response:
    error: RequestError | None = None
    try:
        await work
    except UnavailableError:
        raise
    except RequestError as failed:
        error = failed
    store = state.engine.adapters
    loaded = {} if store is None else {entry.name: str(entry.path) for entry in store.entries}
    answer = {"success": error is None, "error_message": None if error is None else str(error)}
    return json_response(answer | {"loaded_adapters": loaded}, 200 if error is None else 400)


def _store(state: State) -> AdapterStore:
    if state.engine.adapters is None:
        raise RequestError("This server takes no LoRA adapters; start it with --enable-lora.")
    return state.engine.adapters


async def _load(state: State, body: Body) -> Entry:
    store = _store(state)
    name, path = _required(body, "lora_name", 128), _required(body, "lora_path", MAX_PATH)
    in_place, pinned = body.boolean("load_inplace", False), body.boolean("pinned", False)
    if name in state.model.names:
        raise RequestError(f"`lora_name` is the model's own name: {name}", param="lora_name")
    if state.engine.sleep_level:
        raise UnavailableError("The model is asleep; POST /wake_up first.")
    try:
        return await store.load(name, path, in_place=in_place, pinned=pinned)
    except AdapterError as error:
        told = _PATH.sub(lambda found: found[0].rstrip("/").rpartition("/")[2] or "/", str(error))
        raise ApiError(400, f"The LoRA adapter was not loaded: {told}", param="lora_path") from None


async def _unload(state: State, body: Body) -> Entry:
    return await _store(state).unload(_required(body, "lora_name", 128))


def _required(body: Body, name: str, most: int) -> str:
    text = body.string(name, None, most=most)
    if not text:
        raise invalid(name, "is required")
    return text


ROUTES = (
    ("POST", "/v1/load_lora_adapter", load),
    ("POST", "/v1/unload_lora_adapter", unload),
    ("POST", "/load_lora_adapter", sglang_load),
    ("POST", "/unload_lora_adapter", sglang_unload),
)
IS_ADMIN = True

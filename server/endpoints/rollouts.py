"""What trainers of reinforcement learning call: weights that come over a group or in a body, as SGLang's and vLLM's.

Whatever comes is staged, and serves only when all of it has been read as a checkpoint is; see engine/updates.py. While
the engine is paused SGLang's pieces are one update, which /continue_generation or /resume ends.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from functools import partial
from typing import Any

from aiohttp import web

from engine.config import StartupError
from engine.forward import PARTS
from engine.updates import DTYPES, ITEM_BYTES, WeightUpdates, checksums, connect
from server.directories import take_directory
from server.protocol.body import Body, invalid, read_body
from server.protocol.errors import ApiError, json_response, without_paths
from server.state import STATE

UPDATES: web.AppKey[WeightUpdates] = web.AppKey("updates", WeightUpdates)
# What /weights_checker's `snapshot` keeps for its `compare`.
SNAPSHOT: web.AppKey[dict[str, str]] = web.AppKey("snapshot", dict)

MAX_TENSORS = 1_000_000
MAX_NAME = 512
MAX_DIMENSIONS = 8
# What vLLM's trainers pack into one message, unless they are told otherwise.
PACKED_BYTES = 1 << 30
# What SGLang calls parts of the memory.
TAGS = (*PARTS, "cuda_graph")
# The name of the one group that vLLM's trainers have.
_ENGINE = "weight_transfer"
_PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")
_INTACT = "The weights of this server are read anew as a whole; nothing is left to process."


def backend(app: web.Application) -> str:
    """What groups are made of on this device."""
    return "nccl" if hasattr(app[STATE].engine.executor, "layer") else "gloo"


# ---- SGLang's


async def init_group(request: web.Request) -> web.Response:
    body = await read_body(request)
    name = body.string("group_name", "weight_update_group", most=MAX_NAME)
    await _join(request, body, name, body.string("backend", backend(request.app), most=16))
    return json_response({"success": True, "message": "The group is there."})


async def destroy_group(request: web.Request) -> web.Response:
    body = await _read_optional(request)
    await request.app[UPDATES].leave(body.string("group_name", "weight_update_group", most=MAX_NAME))
    return json_response({"success": True, "message": "The group is no more."})


async def update_from_distributed(request: web.Request) -> web.Response:
    """`names`, `dtypes` and `shapes` of what rank 0 broadcasts, in this order."""
    body = await read_body(request)
    name = body.string("group_name", "weight_update_group", most=MAX_NAME)
    tensors = _read_tensors(body, "dtypes")
    if (form := body.string("load_format", None, most=64)) is not None:
        raise invalid("load_format", f"must be left out: {form!r:.80} is not a form that is received")
    _read_rest(body)
    await request.app[UPDATES].receive(name, *tensors)
    return await _end_piece(request, body)


async def update_from_tensor(request: web.Request) -> web.Response:
    """`serialized_named_tensors`: base64 of safetensors files; or one such file as the body itself
    (application/octet-stream, with `?weight_version=`), however large."""
    updates = request.app[UPDATES]
    if request.content_type == "application/octet-stream":
        body = Body({name: value for name, value in request.query.items() if name == "weight_version"})
        files, where = [await _read_file(request)], "body"
    else:
        body, where = await read_body(request), "serialized_named_tensors"
        form = body.string("load_format", None, most=64)
        if form not in (None, "auto", "safetensors"):
            raise invalid("load_format", "must be safetensors")
        given = body.raw(where)
        given = [given] if isinstance(given, str) else given
        if not isinstance(given, list) or not given or not all(isinstance(one, str) for one in given):
            raise invalid(where, "must be a list of safetensors files in base64")
        try:
            files = await asyncio.to_thread(lambda: [base64.b64decode(one, validate=True) for one in given])
        except (binascii.Error, ValueError):
            raise invalid(where, "must be base64 of safetensors bytes") from None
    _read_rest(body)
    if any(data.startswith(_PICKLES) for data in files):
        raise invalid(
            where,
            "holds a pickle, which is never read: send safetensors bytes (safetensors.torch.save of a dict of tensors)",
        )
    await updates.add_files(files, where)
    return await _end_piece(request, body)


async def pause_generation(request: web.Request) -> web.Response:
    """`mode`: "abort" (the default) answers with the tokens so far; "retract" holds requests, whose KV is computed
    again; "in_place" holds them with it."""
    engine, body = request.app[STATE].engine, await _read_optional(request)
    mode = body.choice("mode", ("abort", "retract", "in_place")) or "abort"
    await engine.pause("abort" if mode == "abort" else "keep")
    if mode == "retract":
        engine.forget_held()
    return json_response({"status": "ok", "message": f"Paused ({mode})."})


async def continue_generation(request: web.Request) -> web.Response:
    """Serve with what came meanwhile. A 4xx where it does not fit: the old weights serve on."""
    try:
        await request.app[UPDATES].finish_pieces()
    finally:
        await request.app[STATE].engine.resume()
    return json_response({"status": "ok", "message": "Generation goes on."})


async def release_memory(request: web.Request) -> web.Response:
    """`tags`: parts that go, all where none is named. While requests are there only where the engine is paused."""
    parts = _read_parts(await _read_optional(request))
    try:
        await request.app[STATE].engine.release(parts)
    except StartupError as error:
        raise ApiError(400, f"The memory was not released: {without_paths(str(error))}") from None
    return json_response({"success": True, "message": "The memory is released."})


async def resume_memory(request: web.Request) -> web.Response:
    """`tags`: parts that come back. With its weights alone the server takes others, and serves nobody yet."""
    parts = _read_parts(await _read_optional(request))
    try:
        await request.app[STATE].engine.wake_up(parts)
    except StartupError as error:
        raise ApiError(503, f"The memory did not come back: {without_paths(str(error))}") from None
    return json_response({"success": True, "message": "The memory is back."})


async def get_weight_version(request: web.Request) -> web.Response:
    return json_response({"weight_version": request.app[STATE].engine.weight_version})


async def update_weight_version(request: web.Request) -> web.Response:
    """`new_version` (SGLang) or `weight_version` (vLLM): another name for the weights that serve."""
    body = await read_body(request)
    field = "weight_version" if body.has("weight_version") else "new_version"
    version = body.string(field, None, most=128)
    if version is None:
        raise invalid(field, "is required")
    engine = request.app[STATE].engine
    if body.boolean("abort_all_requests", False):
        engine.abort_all()
    engine.name_weights(version)
    return json_response({"success": True, "message": "The weights have another name.", "new_version": version})


async def check_weights(request: web.Request) -> web.Response:
    """`action`: "checksum" of the served checkpoint's tensors; "snapshot" keeps it, and "compare" compares with it."""
    body = await read_body(request)
    action = body.choice("action", ("checksum", "snapshot", "compare"))
    if action is None:
        raise invalid("action", "is required")
    directory = request.app[STATE].engine.weights_directory
    if directory is None or not directory.is_dir():
        raise ApiError(400, "The served weights are no safetensors, of which checksums are known.")
    try:
        found = await asyncio.to_thread(checksums, directory)
    except (StartupError, OSError):
        raise ApiError(400, "The served weights' files cannot be read any more.") from None
    kept = request.app[SNAPSHOT]
    if action == "snapshot":
        kept.clear()
        kept |= found["per_tensor"]
    elif action == "compare":
        if not kept:
            raise ApiError(400, "There is no snapshot to compare with.")
        names = sorted(kept.keys() | found["per_tensor"].keys())
        differing = [name for name in names if kept.get(name) != found["per_tensor"].get(name)]
        if differing:
            raise ApiError(400, f"{len(differing)} tensors differ from the snapshot, {differing[0]} first.")
    return json_response({"success": True, "message": "Done.", **found})


async def post_process(request: web.Request) -> web.Response:
    return json_response({"success": True, "message": _INTACT})


# ---- vLLM's


async def init_engine(request: web.Request) -> web.Response:
    body = (await read_body(request)).inner("init_info")
    updates = request.app[UPDATES]
    if _ENGINE in updates.groups:
        # A trainer that starts anew.
        await updates.leave(_ENGINE)
    wanted = body.string("init_info.backend", backend(request.app), most=16)
    await _join(request, body, _ENGINE, wanted, prefix="init_info.")
    packed = body.boolean("init_info.packed", False)
    updates.packed_bytes = (
        body.integer("init_info.packed_buffer_size_bytes", PACKED_BYTES, 1, 1 << 36) if packed else None
    )
    return json_response({"message": "The weight transfer engine is there."})


async def shutdown_engine(request: web.Request) -> web.Response:
    await request.app[UPDATES].leave(_ENGINE)
    return json_response({"message": "The weight transfer engine is no more."})


async def start_update(request: web.Request) -> web.Response:
    await request.app[UPDATES].begin()
    return json_response({"message": "Weights may come."})


async def update_weights(request: web.Request) -> web.Response:
    """vLLM's piece of an update; or prime-rl's `weight_dir`, a whole one, where whom a pause holds goes on."""
    whole = await read_body(request)
    updates = request.app[UPDATES]
    if (path := whole.string("weight_dir", None, most=4096)) is not None:
        if whole.raw("update_info") is not None:
            raise invalid("weight_dir", "is an update by itself, without `update_info`")
        if updates.is_begun:
            raise ApiError(409, "An update of pieces is in progress; /finish_weight_update ends it.")
        version = whole.string("weight_version", None, most=128)
        mode = "keep" if request.app[STATE].engine.is_paused else "wait"
        await take_directory(request, path, "weight_dir", mode, version)
        return json_response({"message": "The new weights serve."})
    body = whole.inner("update_info")
    if not updates.is_begun:
        raise ApiError(409, "No update is in progress; /start_weight_update begins one.")
    packed = body.boolean("update_info.packed", updates.packed_bytes is not None)
    size = updates.packed_bytes or PACKED_BYTES
    await updates.receive(
        _ENGINE, *_read_tensors(body, "dtype_names", "update_info."), packed_bytes=size if packed else None
    )
    return json_response({"message": "The weights came."})


async def finish_update(request: web.Request) -> web.Response:
    """Serve with what came; who is here goes on with the new weights, its KV computed anew."""
    version = (await _read_optional(request)).string("weight_version", None, most=128)
    await request.app[UPDATES].finish(version, "keep", begun=True)
    return json_response(
        {"message": "The new weights serve.", "weight_version": request.app[STATE].engine.weight_version}
    )


async def get_world_size(request: web.Request) -> web.Response:
    """One process receives for all ranks."""
    return json_response({"world_size": 1})


async def weight_info(request: web.Request) -> web.Response:
    engine, updates = request.app[STATE].engine, request.app[UPDATES]
    return json_response(
        {
            "weight_version": engine.weight_version,
            "num_weight_updates": engine.num_weight_updates,
            "update_in_progress": updates.is_begun,
            "num_staged_tensors": updates.num_staged,
            "groups": sorted(updates.groups),
        }
    )


# ---- what they share


async def _join(request: web.Request, body: Body, name: str, wanted: str, prefix: str = "") -> None:
    address = body.string(f"{prefix}master_address", None, most=256)
    port = body.integer(f"{prefix}master_port", None, 1, 65535)
    size = body.integer(f"{prefix}world_size", None, 2, 4096)
    rank = body.integer(f"{prefix}rank_offset", 1, 1, 4095)
    for field, value in (("master_address", address), ("master_port", port), ("world_size", size)):
        if value is None:
            raise invalid(f"{prefix}{field}", "is required")
    assert address is not None and port is not None and size is not None
    if rank >= size:
        raise invalid(f"{prefix}rank_offset", "must be below `world_size`")
    known = backend(request.app)
    if wanted not in (known, "gloo"):
        raise invalid(f"{prefix}backend", f"must be {known}, which is what this server's device has")
    await request.app[UPDATES].join(name, partial(_connect, name, address, port, rank, size, wanted))


def _connect(name: str, address: str, port: int, rank: int, size: int, wanted: str, timeout_s: float) -> Any:
    return connect(name, address, port, rank, size, wanted, timeout_s)


def _read_tensors(body: Body, dtypes: str, prefix: str = "") -> tuple[list[str], list[str], list[list[int]]]:
    """Lists of one length: names, types as safetensors has them, shapes."""
    names, types, shapes = (body.raw(prefix + field) for field in ("names", dtypes, "shapes"))
    if not isinstance(names, list) or not 0 < len(names) <= MAX_TENSORS:
        raise invalid(f"{prefix}names", "must be a list of names of tensors")
    if not all(isinstance(name, str) and 0 < len(name) <= MAX_NAME for name in names):
        raise invalid(f"{prefix}names", "must be a list of names of tensors")
    if not isinstance(types, list) or len(types) != len(names):
        raise invalid(prefix + dtypes, "must be a list with one for each of the names")
    read = [DTYPES.get(one.removeprefix("torch."), one) if isinstance(one, str) else "" for one in types]
    if not all(one in ITEM_BYTES for one in read):
        raise invalid(prefix + dtypes, f"must be of {', '.join(DTYPES)}")
    if not isinstance(shapes, list) or len(shapes) != len(names) or not all(map(_is_shape, shapes)):
        raise invalid(f"{prefix}shapes", "must be a list with one shape for each of the names")
    return names, read, shapes


def _is_shape(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= MAX_DIMENSIONS
        and all(type(size) is int and 0 <= size < 2**40 for size in value)
    )


async def _read_optional(request: web.Request) -> Body:
    """No body at all asks for what `{}` does: trainers leave it out where nothing is said."""
    return await read_body(request) if request.can_read_body else Body({})


def _read_parts(body: Body) -> list[str]:
    """cuda_graph: graphs go with either part, and come as they are needed."""
    tags = body.raw("tags")
    if tags is None:
        return list(PARTS)
    if not isinstance(tags, list) or not all(isinstance(tag, str) and tag in TAGS for tag in tags):
        raise invalid("tags", f"must be a list of {', '.join(TAGS)}")
    return [tag for tag in tags if tag in PARTS]


async def _read_file(request: web.Request) -> bytes:
    most, data = await request.app[UPDATES].most_bytes(), bytearray()
    async for piece in request.content.iter_any():
        data += piece
        if len(data) > most:
            raise ApiError(413, f"The body is longer than twice the served checkpoint ({most} bytes).")
    return bytes(data)


def _read_rest(body: Body) -> None:
    """Checked before anything comes. flush_cache: the cache of old weights is never used, whatever is asked for."""
    body.boolean("flush_cache", True)
    body.boolean("abort_all_requests", False)
    body.string("weight_version", None, most=128)


async def _end_piece(request: web.Request, body: Body) -> web.Response:
    """A piece of SGLang's update is one by itself, unless the engine is paused or vLLM's form is under way."""
    updates, engine = request.app[UPDATES], request.app[STATE].engine
    version = body.string("weight_version", None, most=128)
    updates.version = version or updates.version
    if body.boolean("abort_all_requests", False):
        engine.abort_all()
    if updates.is_begun or engine.is_paused:
        return json_response(
            {"success": True, "message": f"{updates.num_staged} tensors wait for the end of the update."}
        )
    await updates.finish_pieces("wait")
    return json_response({"success": True, "message": "The new weights serve."})


ROUTES = (
    ("POST", "/init_weights_update_group", init_group),
    ("POST", "/destroy_weights_update_group", destroy_group),
    ("POST", "/update_weights_from_distributed", update_from_distributed),
    ("POST", "/update_weights_from_tensor", update_from_tensor),
    ("POST", "/pause_generation", pause_generation),
    ("POST", "/continue_generation", continue_generation),
    ("POST", "/release_memory_occupation", release_memory),
    ("POST", "/resume_memory_occupation", resume_memory),
    ("GET", "/get_weight_version", get_weight_version),
    ("GET", "/weight_version", get_weight_version),
    ("POST", "/update_weight_version", update_weight_version),
    ("POST", "/weights_checker", check_weights),
    ("POST", "/weight_checker", check_weights),
    ("POST", "/post_process_weights", post_process),
    ("POST", "/init_weight_transfer_engine", init_engine),
    ("POST", "/shutdown_weight_transfer_engine", shutdown_engine),
    ("POST", "/start_weight_update", start_update),
    ("POST", "/update_weights", update_weights),
    ("POST", "/finish_weight_update", finish_update),
    ("GET", "/get_world_size", get_world_size),
    ("GET", "/weight_info", weight_info),
)
IS_ADMIN = True

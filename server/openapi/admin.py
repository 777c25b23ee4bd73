"""Routes that change the server for everybody: with --admin-api-key they take that key and no other."""

from __future__ import annotations

from engine.forward import PARTS
from engine.resting import PAUSE_MODES
from server.openapi.words import (
    Json,
    array,
    boolean,
    constant,
    either,
    get,
    gives,
    integer,
    mapping,
    post,
    string,
    takes,
)

_ID = string(least=1, about="Of a response, its X-Request-Id, or its `rid`.")
_IDS = either(_ID, array(_ID))

SCHEMAS: Json = {
    "Done": gives({"success": constant(True)}, {"message": string(), "file": string()}),
    "AbortRequest": takes({}, {"rid": _IDS, "request_ids": _IDS, "abort_all": boolean()}, "One of the three."),
    "LoadAdapterRequest": takes(
        {"lora_name": string(least=1, most=128), "lora_path": string("Under --lora-root.", least=1, most=4096)},
        {"load_inplace": boolean("A name that is taken gets these weights."), "pinned": boolean("It keeps its place.")},
    ),
    "UnloadAdapterRequest": takes({"lora_name": string(least=1, most=128)}),
    "LoadedAdapters": gives(
        {
            "success": boolean(),
            "error_message": either(string(), {"type": "null"}),
            "loaded_adapters": mapping(string("Where it is."), "By name."),
        }
    ),
    "WeightsRequest": takes(
        {"model_path": string("A directory on the server's machine.", least=1, most=4096)},
        {
            "load_format": constant("auto", "safetensors"),
            "flush_cache": constant(True),
            "weight_version": string(least=1, most=128),
            "abort_all_requests": boolean("Or it waits for them."),
        },
    ),
}

_FLUSH = "Forget every cached prefix; 400 while requests run or wait."
_ABORT = post(
    "End requests; one that is not there is no error.",
    "AbortRequest",
    gives({"success": constant(True), "num_aborted": integer(0)}),
    examples=({"rid": "cmpl-1"}, {"request_ids": ["cmpl-1"], "abort_all": True}),
)
_LINE: Json = {"text/plain": {"schema": string("One line.")}}
_MODE: Json = {"mode": constant(*PAUSE_MODES, about="What becomes of requests that are there.")}

PATHS: Json = {
    "/flush_cache": get(_FLUSH, "Done") | post(_FLUSH, None, "Done"),
    "/reset_prefix_cache": get(_FLUSH, "Done") | post(_FLUSH, None, "Done"),
    "/abort_request": _ABORT,
    "/abort_requests": _ABORT,
    "/pause": post(
        "Compute nothing until /resume.",
        None,
        gives({"status": constant("paused")}),
        query={**_MODE, "clear_cache": constant("true", "false")},
    ),
    "/resume": post("Go on.", None, gives({"status": constant("resumed")})),
    "/is_paused": get("Whether it is.", gives({"is_paused": boolean()})),
    "/sleep": post(
        "Give the device's memory back: weights to the host (1) or nowhere (2).",
        None,
        None,
        query={"level": constant("1", "2"), **_MODE},
    ),
    "/wake_up": post(
        "Take it again; parts of it, where some are named. Requests are refused until all are there.",
        None,
        None,
        query={"tags": array(constant(*PARTS))},
    ),
    "/is_sleeping": get("Whether it does.", gives({"is_sleeping": boolean()})),
    "/update_weights_from_disk": post(
        "Serve with other weights of the same model.",
        "WeightsRequest",
        gives({"success": constant(True), "message": string(), "num_paused_requests": constant(0)}),
        examples=({"model_path": "."},),
    ),
    "/v1/load_lora_adapter": post(
        "Give a LoRA adapter a name (vLLM).",
        "LoadAdapterRequest",
        None,
        streamed=_LINE,
        examples=({"lora_name": "tuned", "lora_path": "tuned"},),
    ),
    "/v1/unload_lora_adapter": post(
        "Take the name away, and wait for its requests (vLLM).",
        "UnloadAdapterRequest",
        None,
        streamed=_LINE,
        examples=({"lora_name": "tuned"},),
    ),
    "/load_lora_adapter": post(
        "The same (SGLang).",
        "LoadAdapterRequest",
        "LoadedAdapters",
        examples=({"lora_name": "tuned", "lora_path": "tuned"},),
    ),
    "/unload_lora_adapter": post(
        "The same (SGLang).", "UnloadAdapterRequest", "LoadedAdapters", examples=({"lora_name": "tuned"},)
    ),
    "/start_profile": post("Record what the device does (CUDA, --profile-dir).", None, "Done"),
    "/stop_profile": post("Write the trace.", None, "Done"),
}

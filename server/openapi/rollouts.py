"""What trainers of reinforcement learning call; with --admin-api-key these take that key and no other."""

from __future__ import annotations

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

_DONE = gives({"success": constant(True), "message": string()})
_OK = gives({"status": constant("ok"), "message": string()})
_TOLD = gives({"message": string()})
_VERSION = string("What to call the weights.", least=1, most=128)
_GROUP = string("Of the group; weight_update_group.", least=1, most=512)
_NAMES = array(string(least=1, most=512), "Of tensors, as checkpoints have them.", least=1)
_DTYPES = array(string(least=1), "As torch or safetensors has them: bfloat16, F32.", least=1)
_SHAPES = array(array(integer(0), most=8), least=1)
_REST: Json = {
    "flush_cache": boolean("No KV of old weights is used, whatever is said here."),
    "abort_all_requests": boolean(),
    "weight_version": _VERSION,
}
_JOIN: Json = {
    "master_address": string("Where rank 0, the trainer, is.", least=1, most=256),
    "master_port": integer(1, 65535),
    "world_size": integer(2, 4096),
}
_JOIN_MORE: Json = {"rank_offset": integer(1, 4095, "This server's rank."), "backend": constant("gloo", "nccl")}

# What vLLM's weight_versions are: by whose weights which tokens of a choice were made.
SPANS = array(
    gives({"version": string(), "start": integer(0), "end": integer(0)}),
    "By whose weights its tokens were made, where they have changed since the start.",
)

SCHEMAS: Json = {
    "InitGroupRequest": takes(_JOIN, {"group_name": _GROUP, **_JOIN_MORE}),
    "GroupRequest": takes({}, {"group_name": _GROUP}),
    "DistributedRequest": takes(
        {"names": _NAMES, "dtypes": _DTYPES, "shapes": _SHAPES},
        {"group_name": _GROUP, "load_format": string("Nothing but null."), **_REST},
        "Rank 0 broadcasts these, in this order.",
    ),
    "TensorRequest": takes(
        {
            "serialized_named_tensors": either(
                string(), array(string(), least=1), about="safetensors files in base64; never pickles."
            )
        },
        {"load_format": constant("auto", "safetensors"), **_REST},
    ),
    "PauseRequest": takes({}, {"mode": constant("abort", "retract", "in_place")}),
    "MemoryRequest": takes({}, {"tags": array(constant("weights", "kv_cache", "cuda_graph"), "All, if left out.")}),
    "VersionRequest": takes({}, {"new_version": _VERSION, "weight_version": _VERSION, "abort_all_requests": boolean()}),
    "CheckRequest": takes({"action": constant("checksum", "snapshot", "compare")}),
    "InitEngineRequest": takes(
        {
            "init_info": takes(
                _JOIN, {"packed": boolean(), "packed_buffer_size_bytes": integer(1, 1 << 36), **_JOIN_MORE}
            )
        }
    ),
    "UpdateRequest": takes(
        {},
        {
            "update_info": takes({"names": _NAMES, "dtype_names": _DTYPES, "shapes": _SHAPES}, {"packed": boolean()}),
            "weight_dir": string(about="In place of pieces: a directory under --weights-root, as prime-rl names it."),
            "weight_version": _VERSION,
        },
    ),
    "FinishRequest": takes({}, {"weight_version": _VERSION}),
}

_CHECKED = gives(
    {"success": constant(True), "message": string(), "checksum": string(), "per_tensor": mapping(string())}
)
_CHECK = post(
    "Checksums of the served checkpoint's tensors, and whether they changed.",
    "CheckRequest",
    _CHECKED,
    examples=({"action": "checksum"},),
)
_CALLED = get("What the weights that serve are called.", gives({"weight_version": string()}))
_EMPTY: tuple[Json, ...] = ({},)
_JOINS: Json = {"master_address": "127.0.0.1", "master_port": 29500, "world_size": 2}

PATHS: Json = {
    "/init_weights_update_group": post(
        "Join a trainer's group (SGLang).", "InitGroupRequest", _DONE, examples=(_JOINS,)
    ),
    "/destroy_weights_update_group": post("Leave it.", "GroupRequest", _DONE, examples=_EMPTY),
    "/update_weights_from_distributed": post(
        "Take tensors over a group.",
        "DistributedRequest",
        _DONE,
        examples=({"names": ["model.norm.weight"], "dtypes": ["bfloat16"], "shapes": [[64]]},),
    ),
    "/update_weights_from_tensor": post(
        "Take tensors as safetensors bytes; or one such file as the body, application/octet-stream.",
        "TensorRequest",
        _DONE,
        examples=({"serialized_named_tensors": ["AAAA"]},),
    ),
    "/pause_generation": post(
        "Compute nothing until /continue_generation (SGLang).",
        "PauseRequest",
        _OK,
        examples=({"mode": "retract"},),
    ),
    "/continue_generation": post("Go on, with the weights that came meanwhile.", None, _OK),
    "/release_memory_occupation": post(
        "Give the device's memory back, or parts of it (SGLang); /sleep?level=1 does.",
        "MemoryRequest",
        _DONE,
        examples=({"tags": ["kv_cache", "weights"]}, {}),
        may_be_empty=True,
    ),
    "/resume_memory_occupation": post(
        "Take it again; requests are refused until all of it is there.",
        "MemoryRequest",
        _DONE,
        examples=({"tags": ["weights"]}, {"tags": ["kv_cache", "cuda_graph"]}),
        may_be_empty=True,
    ),
    "/get_weight_version": _CALLED,
    "/weight_version": _CALLED,
    "/update_weight_version": post(
        "Call them by another name.",
        "VersionRequest",
        gives({"success": constant(True), "message": string(), "new_version": string()}),
        examples=({"new_version": "step-7"}, {"weight_version": "step-8", "abort_all_requests": False}),
    ),
    "/weights_checker": _CHECK,
    "/weight_checker": _CHECK,
    "/post_process_weights": post("Nothing is left to do after an update.", None, _DONE),
    "/init_weight_transfer_engine": post(
        "Join a trainer's group (vLLM).", "InitEngineRequest", _TOLD, examples=({"init_info": _JOINS},)
    ),
    "/shutdown_weight_transfer_engine": post("Leave it.", None, _TOLD),
    "/start_weight_update": post("Weights will come; the old ones serve on.", None, _TOLD),
    "/update_weights": post(
        "Take tensors over the group, or a directory's.",
        "UpdateRequest",
        _TOLD,
        examples=({"update_info": {"names": ["model.norm.weight"], "dtype_names": ["bfloat16"], "shapes": [[64]]}},),
    ),
    "/finish_weight_update": post(
        "Serve with what came.",
        "FinishRequest",
        gives({"message": string(), "weight_version": string()}),
        examples=({"weight_version": "step-7"},),
    ),
    "/get_world_size": get("Ranks that weights must be sent to.", gives({"world_size": constant(1)})),
    "/weight_info": get(
        "How updates stand.",
        gives(
            {
                "weight_version": string(),
                "num_weight_updates": integer(0),
                "update_in_progress": boolean(),
                "num_staged_tensors": integer(0),
                "groups": array(string()),
            }
        ),
    ),
}

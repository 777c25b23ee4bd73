"""Routes that are no generation: probes and figures; and the error of most routes."""

from __future__ import annotations

from server.openapi.words import (
    NULL,
    OBJECT,
    Json,
    array,
    boolean,
    constant,
    either,
    get,
    gives,
    integer,
    mapping,
    number,
    string,
)

SCHEMAS: Json = {
    "Error": gives(
        {
            "error": gives(
                {
                    "message": string(least=1),
                    "type": constant(
                        "invalid_request_error", "authentication_error", "rate_limit_error", "server_error"
                    ),
                    "param": either(string(), NULL),
                    "code": either(string(), NULL),
                }
            )
        }
    ),
    "Server": gives({"name": constant("oneloop"), "version": string(), "models": array(string(), least=1)}),
    "Version": gives({"version": string()}),
    "ModelInfo": gives(
        {
            "model_path": string(),
            "tokenizer_path": string(),
            "is_generation": boolean(),
            "preferred_sampling_params": either(mapping(number()), NULL),
            "weight_version": string(),
            "has_image_understanding": constant(False),
            "has_audio_understanding": constant(False),
            "max_model_len": integer(1),
        }
    ),
    "Props": gives(
        {
            "default_generation_settings": OBJECT,
            "total_slots": integer(1),
            "model_alias": string(),
            "model_path": string(),
            "chat_template": string(),
            "modalities": gives({"vision": constant(False), "audio": constant(False)}),
            "eos_token": either(string(), NULL),
            "build_info": string(),
            "is_sleeping": boolean(),
        }
    ),
    "Slots": array(
        gives(
            {"id": integer(0), "n_ctx": integer(1), "speculative": constant(False), "is_processing": boolean()},
            {
                "n_prompt_tokens": integer(1),
                "next_token": gives(
                    {"has_next_token": boolean(), "n_decoded": integer(0), "n_remain": integer(0)},
                ),
            },
        )
    ),
}

_INFO = get("Resolved options as they were at start, and the engine's state now.", OBJECT)
_MODEL = get("What the model is.", "ModelInfo")
_SHARE = number(0, 1)
_LOAD = gives(
    {
        **dict.fromkeys(
            (
                "dp_rank", "num_running_reqs", "num_waiting_reqs", "num_waiting_uncached_tokens", "num_total_reqs",
                "num_used_tokens", "max_total_num_tokens", "max_running_requests",
            ),
            integer(0),
        ),
        "token_usage": _SHARE,
        "gen_throughput": number(0, about="Tokens per second since the last question."),
        "cache_hit_rate": _SHARE,
        "utilization": _SHARE,
    }
)  # fmt: skip
_SHORT_LOAD = gives(dict.fromkeys(("dp_rank", "num_reqs", "num_waiting_reqs", "num_tokens"), integer(0)))
_KV_SOURCE = gives(
    {
        "data_parallel_rank": constant(0),
        "endpoint": string(),
        "replay_endpoint": either(string(), NULL),
        "topic": string(),
    }
)

PATHS: Json = {
    "/health": get("200 while the engine makes progress.", None),
    "/v1/health": get("200 while the engine makes progress.", None),
    "/ready": get("The same.", None),
    "/health_generate": get("200 when a token has come out of the model.", None),
    "/metrics": get("Prometheus text.", string(), kind="text/plain"),
    "/": get("What this is; for a browser (Accept: text/html) the page to chat on.", "Server"),
    "/v1": get("What this is.", "Server"),
    "/version": get("The version.", "Version"),
    "/server_info": _INFO,
    "/get_server_info": _INFO,
    "/model_info": _MODEL,
    "/get_model_info": _MODEL,
    "/props": get("The model as llama.cpp's clients ask for it.", "Props"),
    "/slots": get(
        "What runs in each place of the batch.",
        "Slots",
        query={"fail_on_no_slot": constant("0", "1", about="1: a 503 where none is free.")},
    ),
    "/load": get("How many requests run or wait.", gives({"server_load": integer(0)})),
    "/kv_event_sources": get("Where KV events are published (--kv-events-config).", array(_KV_SOURCE, most=1)),
    "/v1/loads": get(
        "What a router balances by.",
        gives({"timestamp": string(), "dp_rank_count": constant(1), "loads": array(_LOAD, least=1, most=1)}),
    ),
    "/get_load": get("The same in short.", array(_SHORT_LOAD, least=1, most=1)),
    "/openapi.json": get("This document.", OBJECT),
}

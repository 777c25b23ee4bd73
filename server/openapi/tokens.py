"""/inference/v1/generate: vLLM's tokens in, tokens out."""

from __future__ import annotations

from server.openapi.openai import GENERATION, IDS, KEPT, PROMPT_LOGPROBS
from server.openapi.rollouts import SPANS
from server.openapi.words import (
    NULL,
    Json,
    alternatives,
    array,
    boolean,
    either,
    events,
    gives,
    integer,
    number,
    post,
    ref,
    refused,
    string,
    takes,
)
from server.protocol.tokens import OWN, PARAM_REFUSALS, REFUSALS, SAMPLING

_OTHERS: Json = {"max_tokens": integer(-1), "logprobs": alternatives()}
_TOKEN: Json = {
    "token": string('By its id: "token_id:17".'),
    "token_id": integer(0),
    "logprob": number(high=0),
    "rank": integer(1, about="1 is the most probable."),
}
_LOGPROBS = gives({"content": array(gives({**_TOKEN, "top_logprobs": array(gives(_TOKEN))}))})

SCHEMAS: Json = {
    "TokensRequest": takes(
        {
            "token_ids": IDS | {"minItems": 1},
            "sampling_params": takes(
                {},
                {
                    **{name: _OTHERS.get(name) or GENERATION[name] for name in SAMPLING},
                    "output_kind": integer(0, 2, "Changes nothing: an answer has all of it."),
                    "detokenize": boolean("Changes nothing: there is no text."),
                    **refused(PARAM_REFUSALS),
                },
            ),
        },
        {**{name: GENERATION[name] for name in OWN}, **refused(REFUSALS)},
    ),
    "GeneratedTokens": gives(
        {
            "request_id": string(),
            "choices": array(
                gives(
                    {
                        "index": integer(0),
                        "token_ids": IDS,
                        "logprobs": either(_LOGPROBS, NULL),
                        "finish_reason": either(string(), NULL),
                    },
                    {"stop_reason": either(string(), integer(), NULL), "weight_versions": SPANS},
                )
            ),
        },
        {"prompt_logprobs": PROMPT_LOGPROBS, "usage": ref("Usage"), "kv_transfer_params": KEPT},
    ),
}

_PROMPT: Json = {"token_ids": [5, 6, 7]}

PATHS: Json = {
    "/inference/v1/generate": post(
        "The tokens that go on from tokens (vLLM).",
        "TokensRequest",
        "GeneratedTokens",
        examples=(
            {**_PROMPT, "sampling_params": {"max_tokens": 4, "n": 2, "logprobs": 2, "prompt_logprobs": 1}},
            {**_PROMPT, "sampling_params": {"max_tokens": 4, "stop": ["e"], "output_kind": 2}, "request_id": "mine"},
            {
                **_PROMPT,
                "sampling_params": {"max_tokens": 4},
                "stream": True,
                "stream_options": {"include_usage": True},
            },
        ),
        streamed=events("GeneratedTokens"),
    )
}

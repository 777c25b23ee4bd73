"""/generate: SGLang's native API."""

from __future__ import annotations

from server.openapi.openai import GENERATION, IDS, KEPT
from server.openapi.rollouts import SPANS
from server.openapi.words import (
    NULL,
    Json,
    alternatives,
    array,
    boolean,
    constant,
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
from server.protocol.completions import MAX_PROMPTS
from server.protocol.refusals import COMPLETION_REFUSALS
from server.protocol.sglang import EACH, MAX_RID_LENGTH, PARAM_REFUSALS, REFUSALS, SAMPLING


def _of_completion(name: str) -> Json:
    """A completion's field."""
    if name == "max_tokens":
        return integer(1)
    found: Json = GENERATION[name] if name in GENERATION else refused(COMPLETION_REFUSALS)[name]
    return found


def _each(schema: Json) -> Json:
    """One value for all prompts, or a list with one for each."""
    return either(schema, array(either(schema, NULL)))


_PARAMETERS = takes(
    {}, {**{theirs: _of_completion(ours) for theirs, ours in SAMPLING.items()}, **refused(PARAM_REFUSALS)}
)
_COMMON: Json = {
    "model": string("An adapter's name; any other is ignored, for routers add one."),
    "sampling_params": _each(_PARAMETERS),
    "rid": _each(string(least=1, most=MAX_RID_LENGTH)),
    "stream": boolean(),
    "return_logprob": _each(boolean()),
    "top_logprobs_num": _each(alternatives()),
    "logprob_start_len": _each(integer(-1)),
    "return_text_in_logprobs": boolean(),
    **{name: _each(_of_completion(name)) for name in EACH},
    **refused(REFUSALS),
}
# Log-probability, id, text.
_OWN = {
    "type": "array",
    "prefixItems": [either(number(), NULL), integer(0), either(string(), NULL)],
    "minItems": 3,
    "maxItems": 3,
}
_TOP = array(either(NULL, array(_OWN)))
_FINISH = either(
    gives({"type": constant("length"), "length": integer(0)}),
    gives({"type": constant("stop"), "matched": either(string(), integer(), NULL)}),
    gives({"type": constant("abort"), "message": string()}),
    NULL,
)

SCHEMAS: Json = {
    "GenerateRequest": either(
        takes({"text": either(string(), array(string(), least=1, most=MAX_PROMPTS))}, {**_COMMON, "input_ids": NULL}),
        takes({"input_ids": either(IDS, array(IDS, least=1, most=MAX_PROMPTS))}, {**_COMMON, "text": NULL}),
    ),
    "Generated": gives(
        {
            "text": string(),
            "output_ids": IDS,
            "meta_info": gives(
                {
                    "id": string(),
                    "finish_reason": _FINISH,
                    "prompt_tokens": integer(0),
                    "completion_tokens": integer(0),
                    "cached_tokens": integer(0),
                },
                {
                    "e2e_latency": number(0),
                    "weight_version": string(),
                    "weight_versions": SPANS,
                    "spec_verify_ct": integer(1, about="Where drafts were tried; this and what follows."),
                    "spec_accept_rate": number(0, 1),
                    "spec_accept_length": number(1),
                    "spec_num_correct_drafts": integer(0),
                    "spec_num_proposed_drafts": integer(1),
                    "input_token_logprobs": array(_OWN),
                    "output_token_logprobs": array(_OWN),
                    "input_top_logprobs": _TOP,
                    "output_top_logprobs": _TOP,
                },
            ),
        },
        {"index": integer(0, about="Of the request, in a stream of several."), "kv_transfer_params": KEPT},
    ),
}

_SHORT: Json = {"sampling_params": {"max_new_tokens": 4, "temperature": 0}}

PATHS: Json = {
    "/generate": post(
        "The text that goes on from a prompt.",
        "GenerateRequest",
        either(ref("Generated"), array(ref("Generated"))),
        examples=(
            {"text": "Once upon a time", **_SHORT},
            {"text": ["a", "b"], "return_logprob": True, "top_logprobs_num": 2, "logprob_start_len": 0, **_SHORT},
            {"input_ids": [5, 6, 7], "stream": True, **_SHORT},
            {"input_ids": [[5, 6], [7]], "stream": True, "return_logprob": True, **_SHORT},
        ),
        streamed=events("Generated"),
    )
}

"""POST /inference/v1/generate: vLLM's body of tokens in and tokens out becomes a completion's body, and that a Plan."""

from __future__ import annotations

from typing import Any

from server.protocol.body import Body, are_token_ids, invalid
from server.protocol.completions import parse_completion
from server.protocol.generation import Plan
from server.protocol.naming import in_words_of
from server.protocol.refusals import COMPLETION_REFUSALS, refuse, refuse_in
from server.state import State

# Of vLLM's SamplingParams, under the names of a completion's fields.
SAMPLING = (
    *("n", "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "seed"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "allowed_token_ids", "bad_words"),
    *("stop", "stop_token_ids", "ignore_eos", "include_stop_str_in_output", "skip_special_tokens"),
    *("spaces_between_special_tokens", "logprobs", "prompt_logprobs", "structured_outputs"),
)
# Beside them: fields of the body.
OWN = ("model", "stream", "stream_options", "cache_salt", "priority", "kv_transfer_params", "request_id")
REFUSALS: dict[str, tuple[object, ...]] = {"features": (), "output_mode": ("tokens",), "return_token_ids": (True,)}
PARAM_REFUSALS: dict[str, tuple[object, ...]] = {
    name: COMPLETION_REFUSALS[name]
    for name in ("logprob_token_ids", "repetition_detection", "thinking_token_budget", "truncate_prompt_tokens")
} | {"extra_args": ({},), "flat_logprobs": (False,), "skip_reading_prefix_cache": (False,)}
_NAMES = {name: f"sampling_params.{name}" for name in SAMPLING} | {"prompt": "token_ids"}
# What a stream of vLLM's engine brings; an answer has all of it, and its stream what is new.
_MAX_OUTPUT_KIND = 2


async def parse_tokens(body: Body, state: State, response_id: str) -> Plan:
    """Raises RequestError for anything that cannot be served."""
    refuse(body, REFUSALS)
    vocab_size = state.model.model_config.vocab_size
    token_ids, params = body.raw("token_ids"), body.raw("sampling_params")
    if not isinstance(token_ids, list) or not token_ids or not are_token_ids(token_ids, vocab_size):
        raise invalid("token_ids", f"must be a list of token ids from 0 to {vocab_size - 1}")
    if not isinstance(params, dict):
        raise invalid("sampling_params", "must be an object")
    refuse_in("sampling_params", params, PARAM_REFUSALS)
    inner = Body({f"sampling_params.{name}": params.get(name) for name in ("output_kind", "detokenize")})
    inner.integer("sampling_params.output_kind", None, 0, _MAX_OUTPUT_KIND)
    if not inner.boolean("sampling_params.detokenize", True) and params.get("stop"):
        raise invalid("sampling_params.detokenize", "must be true beside `stop`, which is looked for in the text")
    fields: dict[str, Any] = {name: params.get(name) for name in SAMPLING} | {name: body.raw(name) for name in OWN}
    # Log-probabilities name tokens by their ids.
    fields |= {"prompt": token_ids, "return_token_ids": True, "return_tokens_as_token_ids": True}
    with in_words_of(_NAMES):
        return await parse_completion(Body(fields, body.size), state, response_id)

"""POST /completion: llama.cpp's native body becomes a completion's, which becomes a Plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engine.request import MAX_TOP_LOGPROBS
from engine.text.tokenizer import Tokenizer
from server.protocol.body import Body, check_nesting, invalid
from server.protocol.completions import parse_completion
from server.protocol.generation import Plan
from server.protocol.ignored import ignore
from server.protocol.refusals import refuse
from server.state import State

# llama.cpp's names and ours.
RENAMED = {"n_predict": "max_tokens", "repeat_penalty": "repetition_penalty", "n_probs": "logprobs"}
NAMES = {ours: theirs for theirs, ours in RENAMED.items()}
# Means here what it means in a completion.
SAME = (
    *("model", "prompt", "stream", "stop", "seed", "ignore_eos", "grammar", "json_schema", "logit_bias"),
    *("temperature", "top_k", "top_p", "min_p", "presence_penalty", "frequency_penalty"),
    *("cache_salt", "priority", "user", "timeout"),
)
# Samplers that this server does not have, with the values that turn them off.
REFUSALS: dict[str, tuple[object, ...]] = {
    "mirostat": (0,),
    "dry_multiplier": (0,),
    "xtc_probability": (0,),
    "typical_p": (1,),
    "dynatemp_range": (0,),
    "top_n_sigma": (-1,),
    "t_max_predict_ms": (-1, 0),
    "post_sampling_probs": (False,),
    "lora": ([],),
}
# Wishes about slots, memory and the shape of the answer, and the order of samplers, which is fixed here; with the
# values that ask for nothing.
HINTS: dict[str, tuple[object, ...]] = {
    "id_slot": (-1,),
    "cache_prompt": (True,),
    "n_keep": (0,),
    "n_discard": (0,),
    "samplers": ([],),
    "response_fields": ([],),
    "return_progress": (False,),
}
# llama.cpp's word for a token that must not come is false, ours is the lowest bias.
_NEVER = -100
# Texts are split into tokens on the loop.
MAX_BIASES = 1024
MAX_BIAS_TEXT = 16384


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the answer has to know beside the Plan.

    is_list: many answers in a list, whatever their number. with_tokens: token ids come beside the text. each_timed:
    every event of a stream has its timings.
    """

    is_list: bool
    with_tokens: bool
    each_timed: bool


async def parse_native(body: Body, state: State, response_id: str) -> tuple[Plan, Wanted]:
    """Raises RequestError for anything that cannot be served, in our names."""
    refuse(body, REFUSALS)
    for name, neutral in HINTS.items():
        if body.has(name) and body.raw(name) not in neutral:
            ignore(name)
    fields: dict[str, Any] = {name: body.raw(name) for name in SAME}
    fields |= {ours: body.raw(theirs) for theirs, ours in RENAMED.items()}
    if fields["stop"] == "":
        fields["stop"] = None
    if fields["seed"] == -1:
        # llama.cpp's default: another text every time.
        fields["seed"] = None
    if fields["grammar"] == "":
        fields["grammar"] = None
    # How far back penalties look; here it is the whole text or nothing.
    if (last := body.integer("repeat_last_n", -1, -1)) is not None and last > 0:
        ignore("repeat_last_n")
    if last == 0:
        fields |= {"repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}
    if not body.integer("n_probs", 0, 0, MAX_TOP_LOGPROBS):
        fields["logprobs"] = None
    if isinstance(fields["logit_bias"], list):
        fields["logit_bias"] = _read_bias(fields["logit_bias"], state.tokenizer)
    wanted = Wanted(
        is_list=_is_many(body.raw("prompt")),
        with_tokens=body.boolean("return_tokens", False),
        each_timed=body.boolean("timings_per_token", False),
    )
    return await parse_completion(Body(fields, body.size), state, response_id, default_max_tokens=None), wanted


def _is_many(prompt: Any) -> bool:
    """Whether it is a list of prompts, and not one of token ids."""
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], str | list)


def _read_bias(pairs: list[Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """Pairs of a token's id, or of a text, and a number or false, as an object."""
    check_nesting("logit_bias", pairs)
    texts = [pair[0] for pair in pairs if isinstance(pair, list) and pair and isinstance(pair[0], str)]
    if len(pairs) > MAX_BIASES or sum(map(len, texts)) > MAX_BIAS_TEXT:
        raise invalid("logit_bias", f"must be at most {MAX_BIASES} pairs, with {MAX_BIAS_TEXT} characters of text")
    bias: dict[str, Any] = {}
    for index, pair in enumerate(pairs):
        if not isinstance(pair, list) or len(pair) != 2 or isinstance(pair[0], bool):
            raise invalid(f"logit_bias[{index}]", "must be a pair of a token id or a text, and a number or false")
        of, value = pair
        if not isinstance(of, int | str) or value is True or not isinstance(value, int | float):
            raise invalid(f"logit_bias[{index}]", "must be a pair of a token id or a text, and a number or false")
        if value is False:
            value = _NEVER
        elif not -100 <= value <= 100:
            raise invalid("logit_bias", f"must have a number from -100 to 100 in pair {index}")
        ids = [of] if isinstance(of, int) else tokenizer.encode(of, add_special_tokens=False)
        bias |= {str(token_id): value for token_id in ids}
    return bias

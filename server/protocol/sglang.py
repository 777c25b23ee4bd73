"""POST /generate: SGLang's native body becomes one completion's body for each prompt, and these one Plan."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from engine.request import Request
from server.adapters import adapter_name
from server.protocol.body import Body, are_token_ids, invalid
from server.protocol.completions import MAX_PROMPTS, parse_completion
from server.protocol.generation import Plan, check_count
from server.protocol.naming import in_words_of
from server.protocol.refusals import refuse, refuse_in
from server.state import State

DEFAULT_MAX_NEW_TOKENS = 128
MAX_RID_LENGTH = 128
# SGLang's names in `sampling_params` and ours.
SAMPLING = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "sampling_seed": "seed",
} | {
    name: name
    for name in (
        "n",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "stop",
        "stop_token_ids",
        "stop_regex",
        "no_stop_trim",
        "frequency_penalty",
        "presence_penalty",
        "repetition_penalty",
        "logit_bias",
        "ignore_eos",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "json_schema",
        "regex",
        "ebnf",
        "structural_tag",
        "custom_params",
        "stream_interval",
        "watermark",
    )
}
_NAMES = {ours: f"sampling_params.{theirs}" for theirs, ours in SAMPLING.items()} | {"logprobs": "top_logprobs_num"}
_STRUCTURES = ("json_schema", "regex", "ebnf", "structural_tag")
# One value for all prompts or a list with one for each; given to the completion as they are.
EACH = (
    *("cache_salt", "extra_key", "priority", "lora_path", "custom_logit_processor"),
    *("speculative", "max_draft_tokens", "kv_transfer_params"),
)
PARAM_REFUSALS: dict[str, tuple[object, ...]] = {"beam_width": (1,), "ebnf_full_assistant": (False,)}
REFUSALS: dict[str, tuple[object, ...]] = {
    "input_embeds": (),
    "image_data": ([],),
    "video_data": ([],),
    "audio_data": ([],),
    "session_params": ({},),
    "token_ids_logprob": (),
    "return_hidden_states": (False,),
    "return_routed_experts": (False,),
    "return_sampling_mask": (False,),
    "return_flat_raw_top_logprobs": (False,),
    "return_flat_raw_output_top_logprobs": (False,),
    "return_bytes": (False,),
    "return_entropy": (False,),
    "return_prompt_token_ids": (False,),
    "require_reasoning": (False,),
    "max_thinking_tokens": (),
    "background": (False,),
    "positional_embed_overrides": (),
    "multi_item_delimiter_indices": (),
    "token_indices_to_pool": (),
    "watermark": (),
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the answer has to know beside the Plan.

    rids: the client's own ids by request, None for ours. starts: the first prompt token by request whose
    log-probability is reported. is_list: many answers in a list, whatever their number. with_text: log-probabilities
    come with the text of their tokens. names: our names of fields and the client's.
    """

    rids: list[str | None]
    starts: list[int]
    is_list: bool
    with_text: bool
    names: Mapping[str, str]


async def parse_generate(body: Body, state: State, response_id: str) -> tuple[Plan, Wanted]:
    """Raises RequestError for anything that cannot be served, in SGLang's names. `model` is what routers add for
    themselves; SGLang never looks at it."""
    refuse(body, REFUSALS)
    by_text = body.has("text")
    if by_text == body.has("input_ids"):
        raise invalid("text", "or `input_ids` is required, and only one of them")
    name = "text" if by_text else "input_ids"
    prompts, is_list = _read_prompts(body, name, state.model.model_config.vocab_size)
    stream, with_text = body.boolean("stream", False), body.boolean("return_text_in_logprobs", False)
    each = _Each(body, len(prompts), is_list)
    params, rids = each.values("sampling_params"), each.rids()
    names = _NAMES | {"prompt": name}
    plans: list[Plan] = []
    starts: list[int] = []
    for index, prompt in enumerate(prompts):
        fields = {"prompt": prompt, "stream": stream, **each.at(EACH, index)}
        fields |= _read_params(params[index])
        if isinstance(given := body.raw("model"), str) and adapter_name(given, state.model) is not None:
            fields["model"] = given
        own = Body(each.at(("return_logprob", "top_logprobs_num", "logprob_start_len"), index))
        wants_logprobs = own.boolean("return_logprob", False)
        top = own.integer("top_logprobs_num", 0, 0, state.model.max_logprobs)
        if wants_logprobs:
            fields["logprobs"] = top
        elif top:
            raise invalid("top_logprobs_num", "needs `return_logprob` to be true")
        with in_words_of(names):
            # One prompt's id is the response's own, which its choices share.
            plan = await parse_completion(
                Body(fields),
                state,
                f"{response_id}-{index}" if is_list else response_id,
                default_max_tokens=DEFAULT_MAX_NEW_TOKENS,
            )
        check_count(state, plan.num_candidates * len(prompts))
        size = len(plan.requests[0].prompt_token_ids)
        start = own.integer("logprob_start_len", -1, -1, size)
        # The default is none of the prompt's tokens.
        start = size if start < 0 else start
        if wants_logprobs and start < size - 1:
            plan = replace(plan, requests=_with_prompt_logprobs(plan, top))
        if plan.num_candidates != (plans or [plan])[0].num_candidates:
            raise invalid("sampling_params.n", "must be the same for all prompts")
        plans.append(plan)
        starts += [start] * plan.num_candidates
        if is_list:
            # Short texts are encoded on the loop; a thousand of them must not hold it.
            await asyncio.sleep(0)
    requests = [request for plan in plans for request in plan.requests]
    num_each = plans[0].num_candidates
    merged = replace(plans[0], id=response_id, requests=requests)
    shared = [rid for rid in rids for _ in range(num_each)]
    return merged, Wanted(shared, starts, is_list or num_each > 1, with_text, names)


def _read_prompts(body: Body, name: str, vocab_size: int) -> tuple[list[Any], bool]:
    """The prompts, and whether the client gave a list of them."""
    value = body.raw(name)
    is_list = isinstance(value, list) and (name == "text" or (bool(value) and isinstance(value[0], list)))
    prompts = value if is_list else [value]
    if not 0 < len(prompts) <= MAX_PROMPTS:
        raise invalid(name, f"must hold 1 to {MAX_PROMPTS} prompts")
    if name == "text" and not all(isinstance(prompt, str) for prompt in prompts):
        raise invalid(name, "must be a string or a list of strings")
    if name == "input_ids" and not all(prompt and are_token_ids(prompt, vocab_size) for prompt in prompts):
        raise invalid(name, f"must be token ids from 0 to {vocab_size - 1}, or a list of non-empty lists of such ids")
    return prompts, is_list


class _Each:
    """Fields that have one value for all prompts, or a list with one for each."""

    def __init__(self, body: Body, count: int, is_list: bool) -> None:
        self._body = body
        self._count = count
        self._is_list = is_list

    def values(self, name: str) -> list[Any]:
        value = self._body.raw(name)
        if not isinstance(value, list):
            return [value] * self._count
        if not self._is_list or len(value) != self._count:
            raise invalid(name, f"must be one value, or a list with one for each of {self._count} prompts")
        return value

    def at(self, names: tuple[str, ...], index: int) -> dict[str, Any]:
        return {name: self.values(name)[index] for name in names}

    def rids(self) -> list[str | None]:
        """One id for all is numbered, as SGLang does."""
        values = self.values("rid")
        for value in values:
            if value is not None and not (isinstance(value, str) and 0 < len(value) <= MAX_RID_LENGTH):
                raise invalid("rid", f"must have 1 to {MAX_RID_LENGTH} characters")
        if self._is_list and isinstance(rid := self._body.raw("rid"), str):
            return [f"{rid}_{index}" for index in range(self._count)]
        return values


def _read_params(params: Any) -> dict[str, Any]:
    """`sampling_params` of one prompt in our names."""
    if params is None:
        return {}
    if not isinstance(params, dict):
        raise invalid("sampling_params", "must be an object, or a list with one for each prompt")
    refuse_in("sampling_params", params, PARAM_REFUSALS)
    read = {ours: params.get(theirs) for theirs, ours in SAMPLING.items()}
    # SGLang takes an empty structure for none.
    return read | {name: None for name in _STRUCTURES if read[name] == ""}


def _with_prompt_logprobs(plan: Plan, top: int) -> list[Request]:
    """As make_plan does: one for all choices is enough, but those of a stream do not wait for each other."""
    return [
        replace(request, sampling=replace(request.sampling, prompt_logprobs=top))
        if plan.stream or not index
        else request
        for index, request in enumerate(plan.requests)
    ]

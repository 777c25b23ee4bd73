"""POST /completion and /infill: llama.cpp's native bodies become a completion's, which becomes a Plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from engine.text.tokenizer import Tokenizer
from server.protocol.body import Body, check_nesting, invalid
from server.protocol.completions import MAX_PROMPTS, parse_completion
from server.protocol.generation import Plan
from server.protocol.ignored import ignore
from server.protocol.infill import ending, find_infill, infill_prompt
from server.protocol.refusals import refuse
from server.state import State

# llama.cpp's names and ours.
RENAMED = {
    "n_predict": "max_tokens",
    "repeat_penalty": "repetition_penalty",
    "n_probs": "logprobs",
    "n_cmpl": "n",
}
NAMES = {ours: theirs for theirs, ours in RENAMED.items()}
# Means here what it means in a completion.
SAME = (
    *("model", "prompt", "stream", "stop", "seed", "ignore_eos", "grammar", "json_schema", "logit_bias"),
    *("temperature", "top_k", "top_p", "min_p", "presence_penalty", "frequency_penalty"),
    *("cache_salt", "priority", "user", "timeout", "speculative", "max_draft_tokens"),
)
# Samplers that this server does not have, with the values that turn them off.
REFUSALS: dict[str, tuple[object, ...]] = {
    "kv_transfer_params": (),
    "mirostat": (0,),
    "dry_multiplier": (0,),
    "xtc_probability": (0,),
    "typical_p": (1,),
    "dynatemp_range": (0,),
    "top_n_sigma": (-1,),
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
    # Editors say how long a line may take: n_predict bounds it as well.
    "t_max_prompt_ms": (-1, 0),
    "t_max_predict_ms": (-1, 0),
    "return_progress": (False,),
}
# llama.cpp's word for a token that must not come is false, ours is the lowest bias.
_NEVER = -100
# Texts are split into tokens on the loop.
MAX_BIASES = 1024
MAX_BIAS_TEXT = 16384
MAX_FIELDS, MAX_FIELD = 64, 256
MAX_FILES = 1024


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the answer has to know beside the Plan.

    is_list: many answers in a list, whatever their number. with_tokens: token ids come beside the text. each_timed:
    every event of a stream has its timings. fields: paths of what is told of an ended answer, all of it without any.
    """

    is_list: bool
    with_tokens: bool
    each_timed: bool
    fields: tuple[str, ...]


async def parse_native(body: Body, state: State, response_id: str) -> tuple[Plan, Wanted]:
    """Raises RequestError for anything that cannot be served, in our names."""
    fields = _read_fields(body, state)
    fields["prompt"] = prompt = await _read_prompt(body.raw("prompt"), state)
    wanted = _read_wanted(body, is_list=_is_many(prompt) or fields["n"] not in (None, 1))
    return await parse_completion(Body(fields, body.size), state, response_id, default_max_tokens=None), wanted


async def parse_infill(body: Body, state: State, response_id: str) -> tuple[Plan, Wanted]:
    """See parse_native. `prompt` is what has been written into the hole already."""
    infill = find_infill(state, "input_suffix")
    before, behind = body.string("input_prefix", None), body.string("input_suffix", None)
    if before is None or behind is None:
        raise invalid("input_prefix" if before is None else "input_suffix", "is required")
    extra = _read_extra(body.raw("input_extra"))
    written = body.string("prompt", "")
    fields = _read_fields(body, state)
    most = body.integer("n_predict", None, -1)
    fields["prompt"] = await infill_prompt(
        state, infill, before + written, behind, extra=extra, max_tokens=None if most == -1 else most, cut=True
    )
    wanted = _read_wanted(body, is_list=fields["n"] not in (None, 1))
    plan = await parse_completion(Body(fields, body.size), state, response_id, default_max_tokens=None)
    requests = [replace(one, sampling=ending(state, infill, one.sampling)) for one in plan.requests]
    return replace(plan, requests=requests), wanted


def _read_wanted(body: Body, *, is_list: bool) -> Wanted:
    fields = body.raw("response_fields")
    if (
        not isinstance(fields, list | None)
        or len(fields or ()) > MAX_FIELDS
        or not all(isinstance(name, str) and len(name) <= MAX_FIELD for name in fields or ())
    ):
        raise invalid("response_fields", f"must be at most {MAX_FIELDS} paths of up to {MAX_FIELD} characters")
    return Wanted(
        is_list=is_list,
        with_tokens=body.boolean("return_tokens", False),
        each_timed=body.boolean("timings_per_token", False),
        fields=tuple(fields or ()),
    )


def _read_fields(body: Body, state: State) -> dict[str, Any]:
    """All but the prompt, as a completion has it."""
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
    if not body.integer("n_probs", 0, 0, state.model.max_logprobs):
        fields["logprobs"] = None
    if isinstance(fields["logit_bias"], list):
        fields["logit_bias"] = _read_bias(fields["logit_bias"], state.tokenizer)
    return fields


async def _read_prompt(prompt: Any, state: State) -> Any:
    """A prompt as a completion has it: here it may be a list of ids and texts, and a text may stand in an object."""
    if not isinstance(prompt, list) or any(isinstance(one, int) for one in prompt):
        return await _read_one(prompt, "prompt", state)
    if len(prompt) > MAX_PROMPTS:
        return prompt
    read = [await _read_one(one, f"prompt[{index}]", state) for index, one in enumerate(prompt)]
    if any(isinstance(one, list) for one in read):
        # A completion wants them of one kind.
        tokenizer = state.tokenizer
        return [await tokenizer.encode_async(one) if isinstance(one, str) else one for one in read]
    return read


async def _read_one(prompt: Any, where: str, state: State) -> Any:
    """One prompt: a text, or a list of ids where there are any."""
    if isinstance(prompt, dict):
        text = prompt.get("prompt_string")
        if not isinstance(text, str):
            raise invalid(f"{where}.prompt_string", "must be a string")
        if prompt.get("multimodal_data"):
            raise invalid(f"{where}.multimodal_data", "must be empty: this model reads text only")
        return text
    if not isinstance(prompt, list) or not any(isinstance(piece, str) for piece in prompt):
        return prompt
    ids: list[Any] = []
    for index, piece in enumerate(prompt):
        # What begins the prompt begins it as a text does.
        ids += (
            await state.tokenizer.encode_async(piece, add_special_tokens=index == 0)
            if isinstance(piece, str)
            else [piece]
        )
    return ids


def _read_extra(files: Any) -> list[tuple[str, str]]:
    """Other files than the one with the hole: names and texts."""
    if files is None:
        return []
    if not isinstance(files, list) or len(files) > MAX_FILES:
        raise invalid("input_extra", f"must be a list of at most {MAX_FILES} objects with a `filename` and a `text`")
    read: list[tuple[str, str]] = []
    for index, file in enumerate(files):
        text, name = (file.get("text"), file.get("filename")) if isinstance(file, dict) else (None, None)
        if not isinstance(text, str):
            raise invalid(f"input_extra[{index}].text", "must be a string")
        if not isinstance(name, str | None):
            raise invalid(f"input_extra[{index}].filename", "must be a string")
        read.append((name or "tmp", text))
    return read


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

"""POST /v1/completions: a JSON body becomes a Plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from server.protocol.body import Body, aside, invalid
from server.protocol.generation import Common, Plan, make_plan, read_common
from server.protocol.infill import ending, find_infill, infill_prompt
from server.protocol.prompts import encode_prompts, read_prompts
from server.protocol.refusals import COMPLETION_REFUSALS, refuse
from server.protocol.structure import make_structure
from server.protocol.structured_fields import read_grammar
from server.state import State

MAX_PROMPTS = 1024
DEFAULT_MAX_TOKENS = 16


async def parse_completion(
    body: Body,
    state: State,
    response_id: str,
    *,
    default_max_tokens: int | None = DEFAULT_MAX_TOKENS,
) -> Plan:
    """Raises RequestError for anything that cannot be served. Other families have other defaults and limits."""
    logprobs = body.integer("logprobs", None, 0, state.model.max_logprobs)
    common = await aside(body, partial(read_common, body, state, "max_tokens", default_max_tokens, logprobs))
    spec = await aside(body, partial(read_grammar, body))
    refuse(body, COMPLETION_REFUSALS)
    add_special_tokens = body.boolean("add_special_tokens", True)
    rows = state.model.model_config.vocab_size
    given = await aside(body, partial(read_prompts, body, "prompt", rows, MAX_PROMPTS))
    prompts: Sequence[Sequence[int]]
    if suffix := body.string("suffix", ""):
        infill = find_infill(state, "suffix")
        texts = [prompt for prompt in given if isinstance(prompt, str)]
        if len(texts) < len(given):
            raise invalid("prompt", "must be text beside a `suffix`")
        common = replace(common, sampling=ending(state, infill, common.sampling))
        behind = await state.tokenizer.encode_async(suffix, add_special_tokens=False)
        special = add_special_tokens
        prompts = [await infill_prompt(state, infill, text, behind, special=special) for text in texts]
    else:
        prompts = await encode_prompts(state, given, add_special_tokens=add_special_tokens)
    echoes = [_echo(prompt, common, state) for prompt in given] if common.echo else None
    structure = await make_structure(state, common.sampling, spec)
    return make_plan(state, common, response_id, prompts, chat=False, echoes=echoes, structure=structure)


def _echo(prompt: str | list[int], common: Common, state: State) -> str:
    """The prompt as text: the client's own where it sent text, decoded as the answer is where it sent ids."""
    if isinstance(prompt, str) or state.engine.tokenizer is None:
        return prompt if isinstance(prompt, str) else ""
    return state.engine.tokenizer.decode(
        prompt,
        skip_special_tokens=common.sampling.skip_special_tokens,
        spaces_between_special_tokens=common.sampling.spaces_between_special_tokens,
    )

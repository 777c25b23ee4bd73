"""POST /v1/completions: a JSON body becomes a Plan."""

from __future__ import annotations

import asyncio
from typing import Any

from server.protocol.body import Body, are_token_ids, invalid
from server.protocol.generation import Plan, make_plan, read_common
from server.protocol.refusals import COMPLETION_REFUSALS, refuse
from server.state import State

MAX_PROMPTS = 1024
DEFAULT_MAX_TOKENS = 16


async def parse_completion(body: Body, state: State, response_id: str) -> Plan:
    """Raises RequestError for anything that cannot be served."""
    common = read_common(body, state, "max_tokens", DEFAULT_MAX_TOKENS)
    refuse(body, COMPLETION_REFUSALS)
    add_special_tokens = body.boolean("add_special_tokens", True)
    given = _prompts(body.raw("prompt"), state.model.model_config.vocab_size)
    prompts: list[list[int]] = []
    for prompt in given:
        if isinstance(prompt, str):
            prompt = await state.tokenizer.encode_async(prompt, add_special_tokens=add_special_tokens)
            # Short texts are encoded on the loop; a thousand of them must not hold it.
            if len(given) > 1:
                await asyncio.sleep(0)
        prompts.append(prompt)
    return make_plan(state, common, response_id, prompts, chat=False)


def _prompts(prompt: Any, vocab_size: int) -> list[str | list[int]]:
    """The four forms of `prompt` as one list."""
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise invalid("prompt", "must be a string, a list of strings, a list of token ids or a list of such lists")
    if are_token_ids(prompt, vocab_size):
        return [prompt]
    if len(prompt) > MAX_PROMPTS and isinstance(prompt[0], str | list):
        raise invalid("prompt", f"must hold at most {MAX_PROMPTS} prompts")
    if all(isinstance(item, str) for item in prompt):
        return prompt
    if all(item and are_token_ids(item, vocab_size) for item in prompt):
        return prompt
    raise invalid(
        "prompt", f"must hold strings, or token ids from 0 to {vocab_size - 1}, or non-empty lists of such ids"
    )

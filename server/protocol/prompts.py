"""Prompts as clients send them, texts or token ids, one or many; and their ids. For completions and embeddings."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial

from engine.text.long_texts import MIN_PACKED, copied
from engine.text.tokenizer import INLINE_CHARACTERS, Tokenizer
from server.protocol.body import Body, are_token_ids, invalid
from server.state import State


def read_prompts(body: Body, name: str, vocab_size: int, most: int) -> list[str | list[int]]:
    """The four forms of the field `name` as one list."""
    prompt = body.raw(name)
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise invalid(name, "must be a string, a list of strings, a list of token ids or a list of such lists")
    if are_token_ids(prompt, vocab_size):
        return [prompt]
    if len(prompt) > most and isinstance(prompt[0], str | list):
        raise invalid(name, f"must hold at most {most} prompts")
    if all(isinstance(item, str) for item in prompt):
        return prompt
    if all(item and are_token_ids(item, vocab_size) for item in prompt):
        return prompt
    raise invalid(name, f"must hold strings, or token ids from 0 to {vocab_size - 1}, or non-empty lists of such ids")


async def encode_prompts(
    state: State, prompts: Sequence[str | list[int]], *, add_special_tokens: bool, most: int | None = None
) -> list[Sequence[int]]:
    """The ids of each prompt; those beyond `most` are cut off its end."""
    encoded: list[Sequence[int]] = []
    for prompt in prompts:
        ids: Sequence[int]
        if not isinstance(prompt, str):
            ids = prompt if len(prompt) < MIN_PACKED else await asyncio.to_thread(copied, prompt)
        else:
            ids = await state.tokenizer.prompt_ids(prompt, add_special_tokens=add_special_tokens)
            # Short texts are encoded on the loop; a thousand of them must not hold it.
            if len(prompts) > 1:
                await asyncio.sleep(0)
        if most is not None and len(ids) > most:
            ids = (
                await _cut(state.tokenizer, prompt, list(ids), most)
                if add_special_tokens and isinstance(prompt, str)
                else ids[:most]
            )
        encoded.append(ids)
    return encoded


async def encode_pairs(state: State, pairs: Sequence[tuple[str, str]], most: int | None) -> list[tuple[list[int], int]]:
    """The ids of each pair of texts, and where the second type of tokens begins. most: see Tokenizer.encode_pair."""
    tokenizer, found = state.tokenizer, []
    for first, second in pairs:
        if len(first) + len(second) <= INLINE_CHARACTERS:
            found.append(tokenizer.encode_pair(first, second, most))
            await asyncio.sleep(0)
        else:
            work = partial(tokenizer.encode_pair, first, second, most)
            found.append(await asyncio.get_running_loop().run_in_executor(tokenizer.pool, work))
    return found


async def _cut(tokenizer: Tokenizer, text: str, ids: list[int], most: int) -> list[int]:
    """As tokenizers truncate: what was added before and behind the text stays; the last token may be the vector's."""
    bare = await tokenizer.encode_async(text, add_special_tokens=False)
    added = len(ids) - len(bare)
    before = next((at for at in range(added + 1) if ids[at : at + len(bare)] == bare), added)
    behind = ids[before + len(bare) :]
    return (ids[:before] + bare[: max(0, most - added)] + behind)[:most]

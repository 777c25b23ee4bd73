"""Fill in the middle for every family that has it: the prompt around a hole, as the model was trained to read one.

Loop thread; long texts go to the tokenizer's pool.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence

from engine.request import MAX_STOP_TOKEN_IDS, RequestError, SamplingParams
from engine.text.infill import Infill
from server.protocol.generation import room_for
from server.state import State


def find_infill(state: State, param: str) -> Infill:
    """The model's marks. Raises RequestError, under the name of the field that asks for it, where it has none."""
    found = Infill.find(state.tokenizer)
    if found is None:
        raise RequestError(
            f"`{param}` asks for the middle of a text, and infill is not supported by this model: its tokenizer has no "
            "tokens for what is before and behind it.",
            param=param,
        )
    return found


async def infill_prompt(
    state: State,
    infill: Infill,
    before: str,
    behind: str | list[int],
    *,
    special: bool = True,
    extra: Sequence[tuple[str, str]] = (),
    max_tokens: int | None = None,
    cut: bool = False,
) -> list[int]:
    """The ids of the prompt. behind: may be ids. special: with what the tokenizer puts first. extra: files by name.

    cut: what is far from the hole is left out where max_tokens, or half of the context, would have no room: editors
    send all that they have.
    """
    tokenizer = state.tokenizer
    bos = tokenizer.bos_token_id
    begin = () if bos is None or not special or tokenizer.encode("")[:1] != [bos] else (bos,)
    sides = [
        await tokenizer.encode_async(side, add_special_tokens=False) if isinstance(side, str) else side
        for side in (before, behind)
    ]
    files: list[int] = []
    for piece in infill.files(extra):
        files += [piece] if isinstance(piece, int) else await tokenizer.encode_async(piece, add_special_tokens=False)
        await asyncio.sleep(0)
    room = None
    if cut:
        whole = room_for(state, [])
        room = max(whole // 2, whole - (whole // 2 if max_tokens is None else max_tokens))
    return infill.prompt(*sides, room=room, extra=files, begin=begin)


def ending(state: State, infill: Infill, sampling: SamplingParams) -> SamplingParams:
    """Sampling that ends where a middle does, too; as far as there is a place for more tokens to stop at."""
    known = dict.fromkeys((*state.engine.eos_token_ids, *sampling.stop_token_ids))
    more = [token for token in infill.ends if token not in known][: max(0, MAX_STOP_TOKEN_IDS - len(known))]
    return dataclasses.replace(sampling, stop_token_ids=(*sampling.stop_token_ids, *more))

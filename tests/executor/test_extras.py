"""Penalties, biases, bans and log-probabilities through the whole engine on a tiny Llama, against transformers.

The tokens are checked one by one: each must be what the independent reference of tests/ops picks from transformers'
logits of everything before it.
"""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import torch

from engine.config import CacheOptions, EngineConfig, SchedulerOptions, StreamOptions
from engine.engine import Engine
from engine.executor.cpu import CPUExecutor
from engine.forward import Limits
from engine.request import Request, SamplingParams
from engine.stream import Delta, TokenLogprob
from tests.executor.cpu_adapter import _models as tiny_models
from tests.ops.test_extras import extras_of, reference

VOCAB = 211
LENGTH = 40
SAMPLINGS: list[dict[str, Any]] = [
    {},
    {"presence_penalty": 1.7, "logprobs": 0},
    {"frequency_penalty": 0.6, "logit_bias": ((5, 3.0), (17, 4.0)), "logprobs": 5},
    {"repetition_penalty": 1.5, "prompt_logprobs": 0},
    {
        "repetition_penalty": 1.2,
        "presence_penalty": -0.4,
        "frequency_penalty": 0.9,
        "logprobs": 3,
        "prompt_logprobs": 2,
    },
    {"allowed_token_ids": tuple(range(40, 60)), "frequency_penalty": 2.0, "logprobs": 2},
    {"prompt_logprobs": 7},
    {"logprobs": 20, "min_tokens": 4},
]
SETUPS: dict[str, dict[str, Any]] = {
    "depth 2": {},
    "depth 1": {"overlap": False},
    "chunks": {"max_num_batched_tokens": 16},
    "retraction": {"num_pages": 22},
}


async def generate(
    params: list[SamplingParams],
    prompts: list[list[int]],
    *,
    overlap: bool = True,
    max_num_batched_tokens: int = 256,
    num_pages: int = 200,
) -> tuple[list[tuple[Delta, list[TokenLogprob] | None]], Engine]:
    limits = Limits(8, max_num_batched_tokens, 128, 8, num_pages, VOCAB)
    executor = CPUExecutor(tiny_models()[0], limits, dtype=torch.float32)
    config = EngineConfig(
        cache=CacheOptions(page_size=8),
        scheduler=SchedulerOptions(
            max_num_seqs=8, max_num_batched_tokens=max_num_batched_tokens, overlap=overlap, admission_watermark=0.0
        ),
        stream=StreamOptions(flush_interval_ms=0.0),
    )
    engine = Engine(config, executor, None, eos_token_ids=(2,))
    task = asyncio.create_task(engine.run())

    async def one(index: int) -> tuple[Delta, list[TokenLogprob] | None]:
        request = Request(f"r{index}", prompts[index], params[index], stream=bool(index % 2))
        async with engine.submit(request) as stream:
            return await stream.collect(), stream.prompt_logprobs

    try:
        return await asyncio.gather(*(one(index) for index in range(len(prompts)))), engine
    finally:
        task.cancel()
        await asyncio.wait({task})
        executor.close()


@torch.inference_mode()
def check(params: SamplingParams, prompt: list[int], delta: Delta, of_prompt: list[TokenLogprob] | None) -> None:
    tokens = prompt + delta.token_ids
    logits = tiny_models()[1](torch.tensor([tokens])).logits[0].float()
    expected = torch.log_softmax(logits, -1).numpy()
    asked = extras_of(
        1,
        prompt,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        logit_bias=params.logit_bias,
        allowed_token_ids=params.allowed_token_ids,
        bad_words=params.bad_words,
    )
    for place in range(len(prompt), len(tokens)):
        changed = reference(logits[place - 1].numpy(), asked, tokens[:place])
        if place < len(prompt) + params.min_tokens:
            changed[2] = -np.inf
        assert tokens[place] == changed.argmax(), f"token {place - len(prompt)}"

    def compare(entry: TokenLogprob, place: int, k: int) -> None:
        row = expected[place - 1]
        assert entry.token_id == tokens[place] and len(entry.top) == k
        np.testing.assert_allclose(entry.logprob, row[tokens[place]], rtol=1e-4, atol=1e-4)
        # Two implementations may disagree about the order of neighbours.
        assert abs(entry.rank - 1 - (row > row[tokens[place]]).sum()) <= 1
        np.testing.assert_allclose([logprob for _, logprob in entry.top], -np.sort(-row)[:k], rtol=1e-4, atol=1e-4)
        for token, logprob in entry.top:
            np.testing.assert_allclose(logprob, row[token], rtol=1e-4, atol=1e-4)

    assert len(delta.logprobs) == (0 if params.logprobs is None else len(delta.token_ids))
    for index, entry in enumerate(delta.logprobs):
        compare(entry, len(prompt) + index, params.logprobs or 0)
    if params.prompt_logprobs is not None:
        assert of_prompt is not None and len(of_prompt) == len(prompt) - 1
        for index, entry in enumerate(of_prompt):
            compare(entry, 1 + index, params.prompt_logprobs)
    else:
        assert of_prompt is None


@pytest.mark.parametrize("setup", SETUPS)
async def test_the_engine_gives_what_the_reference_picks(setup: str) -> None:
    rng = np.random.default_rng(8)
    # Some share a prefix, which a row that asks for its prompt's log-probabilities computes nevertheless.
    shared = rng.integers(3, VOCAB, 17).tolist()
    prompts = [
        (shared if index % 2 else []) + rng.integers(3, VOCAB, int(rng.integers(2, 20))).tolist()
        for index in range(len(SAMPLINGS))
    ]
    plain, _ = await generate([SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)] * 2, prompts[:2])
    params = [
        SamplingParams(temperature=0.0, max_tokens=LENGTH, ignore_eos=fields.get("min_tokens") is None, **fields)
        for fields in SAMPLINGS
    ]
    # A word that would stand at the very start, and one that the prompt begins and the answer would end.
    first = plain[0][0].token_ids
    params[0] = SamplingParams(
        temperature=0.0,
        max_tokens=LENGTH,
        ignore_eos=True,
        bad_words=((first[0], first[1], first[2]), (prompts[0][-1], first[0]), (7,)),
    )
    answers, engine = await generate(params, prompts, **SETUPS[setup])
    for index, (delta, of_prompt) in enumerate(answers):
        check(params[index], prompts[index], delta, of_prompt)
    assert (engine.scheduler.counters.num_preemptions > 0) == (setup == "retraction")
    assert engine.scheduler.kv_cache.num_available == engine.scheduler.kv_cache.num_pages


async def test_slots_forget_the_extras_of_their_last_sequence() -> None:
    """One slot after the other, with and without: the plain answers are those of an engine that knew no extras."""
    prompt = list(range(5, 25))
    plain = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    loud = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, frequency_penalty=2.0, logprobs=1)
    alone, _ = await generate([plain], [prompt])
    mixed, _ = await generate([loud, plain] * 12, [prompt] * 24)
    for index, (delta, _) in enumerate(mixed):
        assert len(delta.logprobs) == (0 if index % 2 else 20)
        assert (delta.token_ids == alone[0][0].token_ids) == bool(index % 2)
    assert len({tuple(delta.token_ids) for delta, _ in mixed}) == 2

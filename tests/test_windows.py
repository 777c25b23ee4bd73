"""Models with windows give pages back, group by group, and answer as transformers does: whole engine, real weights."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.books import check
from engine.build import build_engine
from engine.config import CacheOptions, EngineConfig, ModelOptions, SchedulerOptions
from engine.engine import Engine
from engine.executor.cpu import CPUExecutor
from engine.forward import Limits
from engine.groups import MemoryGroup, plan_groups
from engine.models.registry import read_spec
from engine.ops import native
from engine.request import Request, SamplingParams
from tests.models.support import load, make_checkpoint

WINDOW, PAGE = 24, 4
NEW_TOKENS = 150
LENGTHS = (200, 9, 61)


# Two layers of six see all, and the last window's group has a buffer that no layer uses.
GEMMA3 = {"num_hidden_layers": 8, "head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 24}
GEMMA3_KINDS = ["sliding_attention", "full_attention", *["sliding_attention"] * 5, "full_attention"]


LLAMA4 = {
    "num_hidden_layers": 4,
    "head_dim": 16,
    "attention_chunk_size": WINDOW,
    "floor_scale": 50,
    "intermediate_size_mlp": 56,
    "moe_layers": [],
}


# Heads of two sizes, of which the wider ones see all; the last layers read the keys and values of earlier ones.
GEMMA4 = {
    "num_hidden_layers": 6,
    "head_dim": 16,
    "global_head_dim": 24,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention"] * 3 + ["full_attention", "sliding_attention", "full_attention"],
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": 211,
    "hidden_size_per_layer_input": 8,
}
# Sinks in all layers.
GPT_OSS = {
    "num_hidden_layers": 4,
    "head_dim": 16,
    "sliding_window": WINDOW,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "intermediate_size": 32,
}


def groups_of(directory: Path) -> tuple[MemoryGroup, ...]:
    spec = read_spec(directory)
    return plan_groups(spec.windows, spec.context_length)


def test_groups_of_the_families(tmp_path: Path) -> None:
    """What the start tells scheduler and executor."""
    make_checkpoint(tmp_path / "m", "Mistral", sliding_window=24)
    make_checkpoint(tmp_path / "g", "Gemma3", layer_types=GEMMA3_KINDS, **GEMMA3)
    for name, windows in (("m", (24,)), ("g", (None, 24, 24, 24))):
        model = ModelOptions(path=str(tmp_path / name), load_format="dummy", dtype="float32")
        built = build_engine(EngineConfig(model=model, cache=CacheOptions(num_pages=64), device="cpu"))
        built.engine.executor.close()
        assert tuple(group.window for group in built.engine.limits.groups) == windows


async def generate(
    directory: Path, prompts: list[list[int]], num_pages: int, prefix_cache: bool = True
) -> tuple[list[list[int]], list[list[float]], Engine]:
    """Greedy answers, all at once, with their log-probabilities."""
    model = load(directory)
    limits = Limits(4, 48, 512, PAGE, num_pages, model.config.vocab_size, groups_of(directory))
    config = EngineConfig(
        cache=CacheOptions(num_pages=num_pages, page_size=PAGE, enable_prefix_caching=prefix_cache),
        scheduler=SchedulerOptions(max_num_seqs=4, max_num_batched_tokens=48),
    )
    engine = Engine(config, CPUExecutor(model, limits, dtype=torch.float32), None)
    task = asyncio.create_task(engine.run())

    async def ask(index: int, prompt: list[int]) -> tuple[list[int], list[float]]:
        params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True, logprobs=0)
        async with engine.submit(Request(f"r{index}", prompt, params, stream=False)) as stream:
            delta = await stream.collect()
        assert delta.error is None
        return delta.token_ids, [entry.logprob for entry in delta.logprobs]

    try:
        answers = await asyncio.gather(*(ask(index, prompt) for index, prompt in enumerate(prompts)))
    finally:
        task.cancel()
        await asyncio.wait({task})
        engine.executor.close()
    check(engine.scheduler.kv_cache, [])
    return [tokens for tokens, _ in answers], [numbers for _, numbers in answers], engine


def expect(
    oracle: Any, prompts: list[list[int]], answers: list[list[int]]
) -> tuple[list[list[int]], list[list[float]]]:
    """By transformers, in one pass over each of these answers: the token that it prefers at every place, where all are
    the same a greedy answer, and their log-probabilities."""
    best, numbers = [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.inference_mode():
            logits = oracle(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float()
        best.append(logits.argmax(-1).tolist())
        numbers.append(torch.log_softmax(logits, -1)[torch.arange(len(answer)), answer].tolist())
    return best, numbers


@pytest.mark.parametrize(
    ("family", "sizes", "pools"),
    [
        # At most 192 tokens of cache for texts of 350, 159 and 211; the windows touch up to 8 pages each.
        ("Mistral", {"sliding_window": WINDOW}, (9, 20, 48)),
        # 88 pages of the group that sees all, and 8 of each of the others, are one long text.
        ("Gemma3", {"layer_types": GEMMA3_KINDS, **GEMMA3}, (114, 160, 400)),
        (
            "Gemma2",
            {"num_hidden_layers": 4, "head_dim": 16, "sliding_window": 9, "query_pre_attn_scalar": 24},
            (96, 300),
        ),
        # A layer that sees all, and three that see blocks, each in a group of its own.
        ("Llama4", LLAMA4, (112,)),
        ("Gemma4", GEMMA4, (120,)),
        ("GptOss", GPT_OSS, (112,)),
    ],
    ids=["mistral", "gemma3", "gemma2", "llama4", "gemma4", "gpt-oss"],
)
async def test_texts_in_a_pool_that_is_too_small(
    family: str, sizes: dict[str, Any], pools: tuple[int, ...], tmp_path: Path
) -> None:
    """The same tokens and log-probabilities whatever the pool, with prefix cache and without, by either kernel."""
    oracle = make_checkpoint(tmp_path, family, max_position_embeddings=512, **sizes)
    rng = np.random.default_rng(2)
    prompts = [rng.integers(3, 211, length).tolist() for length in LENGTHS]
    prompts.append([*prompts[0][:150], 5, 6])
    retractions: list[int] = []
    expected: list[list[int]] = []
    logprobs: list[list[float]] = []
    for num_pages, prefix_cache, plain in [
        (pools[0], True, True),
        (pools[0], False, False),
        *((n, True, False) for n in pools),
    ]:
        with native.disabled() if plain else contextlib.nullcontext():
            answers, numbers, engine = await generate(tmp_path, prompts, num_pages, prefix_cache)
        if not expected:
            expected, logprobs = expect(oracle, prompts, answers)
            assert all(len(answer) == NEW_TOKENS for answer in answers)
        assert answers == expected, (num_pages, prefix_cache, plain)
        for ours, theirs in zip(numbers, logprobs, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-4)
        retractions.append(engine.scheduler.counters.num_preemptions)
    # Where all layers have windows, one is admitted only if its windows fit.
    assert retractions[-1] == 0 or len(pools) == 1
    assert max(retractions) > 0 or family == "Mistral"

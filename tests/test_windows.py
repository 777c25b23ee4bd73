"""A model whose every layer slides gives pages back and answers as transformers does: whole engine, real weights."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.build import build_engine
from engine.config import CacheOptions, EngineConfig, ModelOptions, SchedulerOptions
from engine.engine import Engine
from engine.executor.cpu import CPUExecutor
from engine.forward import Limits
from engine.models.registry import read_spec
from engine.ops import native
from engine.request import Request, SamplingParams
from tests.models.support import load, make_checkpoint

WINDOW, PAGE = 24, 4
NEW_TOKENS = 150
LENGTHS = (200, 9, 61)


def longest(directory: Path, family: str, **sizes: Any) -> int | None:
    make_checkpoint(directory, family, **sizes)
    return read_spec(directory).longest_window


def test_windows_of_the_families(tmp_path: Path) -> None:
    """Pages go back only where no layer sees all; the start tells the scheduler."""
    assert longest(tmp_path / "m", "Mistral", sliding_window=24) == 24
    assert longest(tmp_path / "n", "Mistral", sliding_window=None) is None
    assert longest(tmp_path / "g", "Gemma2", head_dim=16, sliding_window=9) is None
    assert longest(tmp_path / "l", "Llama") is None
    model = ModelOptions(path=str(tmp_path / "m"), load_format="dummy", dtype="float32")
    built = build_engine(EngineConfig(model=model, cache=CacheOptions(num_pages=8), device="cpu"))
    built.engine.executor.close()
    assert built.engine.limits.window == 24


async def generate(directory: Path, prompts: list[list[int]], num_pages: int) -> tuple[list[list[int]], int]:
    """Greedy answers, all at once, and how often a sequence was retracted."""
    model = load(directory)
    limits = Limits(4, 48, 512, PAGE, num_pages, model.config.vocab_size, model.config.longest_window)
    config = EngineConfig(
        cache=CacheOptions(num_pages=num_pages, page_size=PAGE),
        scheduler=SchedulerOptions(max_num_seqs=4, max_num_batched_tokens=48),
    )
    engine = Engine(config, CPUExecutor(model, limits, dtype=torch.float32), None)
    task = asyncio.create_task(engine.run())

    async def ask(index: int, prompt: list[int]) -> list[int]:
        params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
        async with engine.submit(Request(f"r{index}", prompt, params, stream=False)) as stream:
            delta = await stream.collect()
        assert delta.error is None
        return delta.token_ids

    try:
        answers = await asyncio.gather(*(ask(index, prompt) for index, prompt in enumerate(prompts)))
    finally:
        task.cancel()
        await asyncio.wait({task})
        engine.executor.close()
    return list(answers), engine.scheduler.counters.num_preemptions


@pytest.mark.parametrize("kernels", ["native", "torch"])
async def test_mistral_in_a_pool_too_small_for_its_texts(kernels: str, tmp_path: Path) -> None:
    oracle = make_checkpoint(tmp_path, "Mistral", sliding_window=WINDOW, max_position_embeddings=512)
    oracle.generation_config.eos_token_id = None
    rng = np.random.default_rng(2)
    prompts = [rng.integers(3, 211, length).tolist() for length in LENGTHS]
    with torch.inference_mode():
        expected = [
            oracle.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS)[0, len(prompt) :].tolist()
            for prompt in prompts
        ]
    if kernels == "native" and native.library() is None:
        pytest.skip(native.status())
    with native.disabled() if kernels == "torch" else contextlib.nullcontext():
        # At most 192 tokens of cache for texts of 350, 159 and 211; the three windows touch up to 7 pages each.
        for num_pages in (9, 20, 48):
            answers, retractions = await generate(tmp_path, prompts, num_pages)
            assert answers == expected, num_pages
            assert retractions == 0 or num_pages < 48

"""Adapters through the whole engine: more of them than places, at once and alone; the answers are the same bits."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import CacheOptions, EngineConfig, LoraOptions, SchedulerOptions, SpeculationOptions
from engine.engine import Engine
from engine.executor.cpu import CPUExecutor
from engine.forward import Limits
from engine.lora.words import AdapterError
from engine.models.loading.adapted import AdaptedLayers
from engine.request import Adapter, Pooling, Request, SamplingParams
from engine.speculation.registry import make_proposer
from tests.lora.handmade import factors, write
from tests.models.support import load, make_checkpoint, prompts_of

PAGE = 4
NUM_ADAPTERS = 5
# tokens, their log-probabilities, those of the prompt, and the vector of its last token
Answer = tuple[list[int], list[float], list[float], list[float]]


async def answers(folder: Path, drafts: int) -> tuple[list[Answer], list[Answer]]:
    """Of the base and every adapter: asked one after the other, and many at once. drafts: of a speculating row."""
    model = load(folder / "base", max_adapters=2)
    assert isinstance(model.adapted, AdaptedLayers)
    limits = Limits(4, 48, 64, PAGE, 64, model.config.vocab_size, max_adapters=2, max_draft_tokens=drafts)
    speculation = SpeculationOptions(
        "ngram", num_draft_tokens=drafts, prompt_lookup_min=1, prompt_lookup_max=2, adaptive=False
    )
    config = EngineConfig(
        cache=CacheOptions(num_pages=limits.num_pages, page_size=PAGE),
        scheduler=SchedulerOptions(max_num_seqs=4, max_num_batched_tokens=48),
        speculation=speculation if drafts else SpeculationOptions(),
    )
    proposer = make_proposer(speculation) if drafts else None
    executor = CPUExecutor(model, limits, dtype=torch.float32, max_lora_rank=8, proposer=proposer)
    adapters: list[Adapter | None] = [None]
    for number in range(1, NUM_ADAPTERS + 1):
        path = write(folder / f"a{number}", factors(model.adapted, number, number), r=number)
        weights = executor.read_adapter(path)
        adapters.append(Adapter(path.name, str(path), number, weights.rank, weights.num_bytes, weights, weights.digest))
    with pytest.raises(AdapterError, match="greater than max_lora_rank 8"):
        executor.read_adapter(write(folder / "large", factors(model.adapted, 9, 0), r=9))
    engine = Engine(config, executor, None)
    task = asyncio.create_task(engine.run())
    prompt = 3 * prompts_of([7])[0]

    async def ask(name: str, adapter: Adapter | None) -> Answer:
        params = SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True, logprobs=0, prompt_logprobs=0)
        async with engine.submit(Request(f"t{name}", prompt, params, stream=False, adapter=adapter)) as stream:
            told, prompt_numbers = await stream.collect(), stream.prompt_logprobs
        last = Request(f"v{name}", prompt, SamplingParams(max_tokens=1), pooling=Pooling("last"), adapter=adapter)
        async with engine.submit(last) as stream:
            assert (await stream.collect()).error is None
            vector = stream.pooled
        assert told.error is None and prompt_numbers is not None and vector is not None
        numbers = [entry.logprob for entry in prompt_numbers]
        return told.token_ids, [entry.logprob for entry in told.logprobs], numbers, vector.tolist()

    try:
        alone = [await ask(f"-{number}", adapter) for number, adapter in enumerate(adapters)]
        together = await asyncio.gather(*(ask(f"+{n}", adapters[n % len(adapters)]) for n in range(18)))
    finally:
        task.cancel()
        await asyncio.wait({task})
        executor.close()
    return alone, together


async def test_more_adapters_than_places_with_and_without_drafts(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "base", "Llama", num_hidden_layers=2)
    alone, together = await answers(tmp_path, 0)
    drafted, drafted_together = await answers(tmp_path, 3)
    assert drafted == alone
    for number, (one, other) in enumerate(zip(together, drafted_together, strict=True)):
        assert one == other == alone[number % len(alone)], number
    firsts = [answer[2] for answer in alone]
    assert all(one != other for at, one in enumerate(firsts) for other in firsts[:at])


@asynccontextmanager
async def served(tmp_path: Path) -> AsyncIterator[tuple[Engine, CPUExecutor, Callable[[str], Awaitable[Any]]]]:
    """Adapters a1 and a2 in files, and a call that uses one of them for one step and returns its weights."""
    make_checkpoint(tmp_path / "base", "Llama")
    model = load(tmp_path / "base", max_adapters=2)
    layers = model.adapted
    assert isinstance(layers, AdaptedLayers)
    limits = Limits(4, 48, 64, PAGE, 64, model.config.vocab_size, max_adapters=2)
    root = tmp_path / "root"
    for number in (1, 2):
        write(root / f"a{number}", factors(layers, 2, number), r=2)
    executor = CPUExecutor(model, limits, dtype=torch.float32, max_lora_rank=8)
    cache = CacheOptions(num_pages=limits.num_pages, page_size=PAGE)
    config = EngineConfig(cache=cache, lora=LoraOptions(enable=True, max_loras=2, root=str(root)))
    engine = Engine(config, executor, None)
    task = asyncio.create_task(engine.run())

    async def use(name: str) -> Any:
        assert engine.adapters is not None
        adapter = await engine.adapters.get(name)
        params = SamplingParams(max_tokens=1, temperature=0.0)
        async with engine.submit(Request(name, prompts_of([7])[0], params, adapter=adapter)) as stream:
            assert (await stream.collect()).error is None
        return adapter.weights

    try:
        yield engine, executor, use
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        executor.close()


async def test_an_adapter_that_is_unloaded_gives_its_memory_back_at_once(tmp_path: Path) -> None:
    """No step follows: the loop is idle, before and after."""
    async with served(tmp_path) as (engine, executor, use):

        async def used(name: str) -> weakref.ref[Any]:
            return weakref.ref(next(iter((await use(name)).branches.values())))

        first, second = await used("a1"), await used("a2")
        steps = engine.metrics.num_steps
        assert engine.adapters is not None and executor._adapted is not None
        site = next(iter(executor._adapted.sites.values()))
        assert len(site.branches) == 2
        await engine.adapters.unload("a2")
        async with asyncio.timeout(20.0):
            # The worker of the last step lets go of what it ran by when its thread has a turn.
            while second() is not None:
                await asyncio.sleep(0.001)
                gc.collect()
        assert first() is not None and len(site.branches) == 1
        assert engine.metrics.num_steps == steps


async def test_while_weights_are_exchanged_nobody_else_touches_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread has them in its hands; a request that comes meanwhile wakes the loop."""
    async with served(tmp_path) as (engine, executor, use):
        await use("a1")
        dropped: list[list[int]] = []
        begun, go = threading.Event(), threading.Event()

        def slow(directory: Path) -> None:
            begun.set()
            assert go.wait(20)

        monkeypatch.setattr(executor, "load_weights", slow)
        monkeypatch.setattr(executor, "drop_adapters", dropped.append)
        loading = asyncio.create_task(engine.load_weights(tmp_path / "base"))
        await asyncio.to_thread(begun.wait, 20)
        waiting = asyncio.create_task(use("a2"))
        for _ in range(4000):
            if engine.scheduler.num_waiting:
                break
            await asyncio.sleep(0.005)
        assert engine.scheduler.num_waiting == 1
        for _ in range(10):
            await asyncio.sleep(0)
        assert not dropped
        go.set()
        await loading
        await waiting

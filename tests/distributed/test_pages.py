"""Pages of a KV cache that two processes have a part of each, on the disk and from server to server: what a restarted
engine goes on from gives the bits of a cold one."""

from __future__ import annotations

import dataclasses
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.build import build_engine
from engine.config import LoraOptions, SpeculationOptions, StartupError
from engine.distributed import shared
from engine.distributed.leader import RankedExecutor
from engine.distributed.shared import STRETCH, SharedMemory, make_file, seen
from engine.engine import Engine
from tests.lora.handmade import factors, write
from tests.models.support import load, make_checkpoint
from tests.tiers.test_models import CASES, ask, checkpoints, config_of, prompt_of, running
from tests.transfer import test_models as transfer

__all__ = ["checkpoints"]
RANKS: dict[str, Any] = {"tensor_parallel_size": 2, "num_threads": 1}


@pytest.mark.parametrize("name", CASES)
async def test_a_restarted_server_goes_on(name: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    common = prompt_of(210)
    first, second, third = ([*common, *prompt_of(40, seed)] for seed in (1, 2, 3))
    async with running(checkpoints[name], None, **RANKS) as engine:
        cold = [await ask(engine, prompt) for prompt in (first, second, third)]
    async with running(checkpoints[name], tmp_path, **RANKS) as engine:
        assert [await ask(engine, prompt) for prompt in (first, second)] == cold[:2]
    end = 208 if name == "state" else 248
    for prompt, expected, num_cached in ((first, cold[0], end), (third, cold[2], 208)):
        async with running(checkpoints[name], tmp_path, **RANKS) as engine:
            found = await ask(engine, prompt)
            assert found.same_bits(expected) and found.num_cached == num_cached
            assert engine.tier is not None and engine.tier.tally.hit_tokens == num_cached
    # Pages of as many ranks alone are known, for their parts are other bytes.
    async with running(checkpoints[name], tmp_path) as engine:
        found = await ask(engine, first)
        assert found.tokens == cold[0].tokens and found.num_cached == 0


async def test_sleep_gives_all_memory_back(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """And what lies there afterwards is read from the disk, not left over."""
    prompt = prompt_of(230)
    async with running(checkpoints["state"], tmp_path, **RANKS) as engine:
        cold = await ask(engine, prompt)
        others = others_of(engine)
        assert all(part.any() for parts in others.values() for part in parts)
        for level in (1, 2):
            await engine.sleep(level)
            assert not any(part.any() for parts in others.values() for part in parts)
            await engine.wake_up()
            found = await ask(engine, prompt)
            assert found.same_bits(cold) and found.num_cached == 192
        assert engine.tier is not None and engine.tier.tally.hit_tokens == 2 * 192


def others_of(engine: Engine) -> dict[str, list[Any]]:
    executor = engine.executor
    assert isinstance(executor, RankedExecutor) and executor._others is not None
    return executor._others


async def test_adapters(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    model = load(checkpoints["full"], max_adapters=2)
    write(tmp_path / "a1", factors(model.adapted, 1, 1), r=1)
    prompt, options = prompt_of(230), {**RANKS, "lora": LoraOptions(enable=True, root=str(tmp_path), max_loras=2)}
    async with running(checkpoints["full"], tmp_path / "kv", **options) as engine:
        cold = [await ask(engine, prompt, name) for name in (None, "a1")]
    assert cold[0].logprobs != cold[1].logprobs
    async with running(checkpoints["full"], tmp_path / "kv", **options) as engine:
        for name, expected in ((None, cold[0]), ("a1", cold[1])):
            found = await ask(engine, prompt, name)
            assert found.same_bits(expected) and found.num_cached == 228


@pytest.mark.parametrize("name", ["full", "state", "windows"])
async def test_from_one_server_to_another(name: str, checkpoints: dict[str, Path]) -> None:
    prompt = prompt_of(230)
    async with transfer.running(checkpoints[name], **RANKS) as prefill:
        cold = await transfer.ask(prefill, prompt)
        async with transfer.running(checkpoints[name], **RANKS) as decode:
            found = await transfer.ask(decode, prompt, source=await transfer.prefilled(prefill, prompt))
            assert found.same_bits(cold) and found.num_cached == 228
            assert transfer.counts(decode) == (228, 0, {})


async def test_what_another_number_of_ranks_has_is_computed(checkpoints: dict[str, Path]) -> None:
    """And said; it is kept until nobody can come for it any more."""
    prompt, briefly = prompt_of(230), dataclasses.replace(transfer.TRANSFER, keep_timeout_s=3.0)
    async with transfer.running(checkpoints["full"], transfer=briefly, **RANKS) as prefill:
        cold = await transfer.ask(prefill, prompt)
        async with transfer.running(checkpoints["full"]) as decode:
            found = await transfer.ask(decode, prompt, source=await transfer.prefilled(prefill, prompt))
            assert found.tokens == cold.tokens and found.num_cached == 0
            assert transfer.counts(decode) == (0, 228, {"mismatch": 1})


async def test_beside_a_model_that_drafts(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Its pages are rank 0's, and go along."""
    drafts = SpeculationOptions("draft_model", str(checkpoints["full"]), num_draft_tokens=2, adaptive=False)
    options, prompt = {**RANKS, "seed": 1, "speculation": drafts}, prompt_of(230)
    async with running(checkpoints["full"], tmp_path, **options) as engine:
        cold = await ask(engine, prompt)
    async with running(checkpoints["full"], tmp_path, **options) as engine:
        found = await ask(engine, prompt)
        assert found.same_bits(cold) and found.num_cached == 228
        # The model drafts for itself: it is right where what it has read is.
        counts = engine.scheduler.speculation
        assert counts is not None and counts.num_accepted_tokens == counts.num_draft_tokens > 4


def test_what_keeps_no_pages_is_one_line(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "Bert", num_key_value_heads=6, type_vocab_size=2)
    with pytest.raises(StartupError, match=r"^--kv-disk needs the prefix cache"):
        build_engine(config_of(tmp_path, tmp_path / "kv", **RANKS))


def test_memory_that_another_process_sees() -> None:
    file = make_file(3)
    memory = SharedMemory(file, 2)
    keys, states = memory.take(5 * 24 + 64)[: 5 * 24].reshape(5, 24), memory.take(7 * 1000).reshape(7, 1000)[2:]
    keys[:] = np.arange(120).reshape(5, 24)
    states[:] = 9
    places = [memory.place_of(keys), memory.place_of(states)]
    assert places[0] == [2 * STRETCH, 5, 24] and places[1][1:] == [5, 1000]
    assert places[1][0] % mmap.PAGESIZE == 2000
    there = seen(file, places)
    assert np.array_equal(there[0], keys) and (there[1] == 9).all()
    there[0][3] = 255
    assert (keys[3] == 255).all() and keys[4, 0] == 96
    memory.release()
    again = memory.take(5 * 24 + 64)
    assert not there[0].any() and not there[1].any() and not again.any()
    assert memory.place_of(again[:120].reshape(5, 24)) == places[0]
    with pytest.raises(AssertionError, match="other memory than before"):
        memory.take(mmap.ALLOCATIONGRANULARITY * 2 + 7000)
    with pytest.raises(AssertionError, match="no memory of the file"):
        memory.place_of(np.zeros((2, 3), np.uint8))
    assert seen(file, []) == []


def test_many_pools_take_few_files(monkeypatch: pytest.MonkeyPatch) -> None:
    file = make_file(2)
    before = len(os.listdir("/proc/self/fd"))
    memory = SharedMemory(file, 1)
    pools = [memory.take(10_000).reshape(10, 1000) for _ in range(300)]
    there = seen(file, [memory.place_of(pool) for pool in pools])
    assert len(os.listdir("/proc/self/fd")) == before + 2
    for number, pool in enumerate(pools):
        pool[:] = number % 251
    assert all((part == number % 251).all() for number, part in enumerate(there))
    monkeypatch.setattr(shared, "PIECE", 1 << 16)
    small = SharedMemory(make_file(1), 0)
    parts = [small.take(count) for count in (40_000, 30_000, 100_000, 10)]
    for number, part in enumerate(parts):
        part[:] = number + 1
    assert [int(part.min()) for part in parts] == [int(part.max()) for part in parts] == [1, 2, 3, 4]
    small.release()
    assert [small.take(len(part)).ctypes.data for part in parts] == [part.ctypes.data for part in parts]


async def test_memory_that_cannot_be_shared_is_one_line(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    def fail(*_: object) -> None:
        raise OSError(24, "Too many open files")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.distributed.leader.seen", fail)
        with pytest.raises(StartupError, match=r"no memory of other ranks can be seen: .*Too many open files"):
            build_engine(config_of(checkpoints["full"], tmp_path, **RANKS))

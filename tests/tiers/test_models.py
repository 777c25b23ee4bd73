"""The disk under whole engines with real weights: what a restarted one goes on from gives the bits of a cold one."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.build import build_engine
from engine.config import (
    CacheOptions,
    EngineConfig,
    LoraOptions,
    ModelOptions,
    SchedulerOptions,
    SpeculationOptions,
    TierOptions,
)
from engine.engine import Engine
from engine.request import Request, SamplingParams
from engine.speculation.draft import DraftModel
from tests.lora.handmade import factors, write
from tests.models.support import load, make_checkpoint
from tests.test_states import FAMILIES
from tests.test_windows import GEMMA3, GEMMA3_KINDS, LLAMA4
from tests.tiers.test_tier import settled

PAGE, BUDGET, COUNT = 4, 64, 12
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("Llama", {"num_hidden_layers": 2}),
    "state": ("Qwen3_5", FAMILIES["Qwen3_5"]),
    "windows": ("Gemma3", GEMMA3 | {"layer_types": GEMMA3_KINDS}),
    "one window": ("Mistral", {"num_hidden_layers": 2, "sliding_window": 24}),
    "chunks": ("Llama4", LLAMA4),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name, (family, sizes) in CASES.items():
        found[name] = tmp_path_factory.mktemp("model")
        make_checkpoint(found[name], family, **{"max_position_embeddings": 512} | sizes)
    return found


def config_of(checkpoint: Path, disk: Path | None, seed: int | None = None, **options: Any) -> EngineConfig:
    return EngineConfig(
        model=ModelOptions(path=str(checkpoint), load_format="dummy", seed=seed, dtype="float32"),
        cache=CacheOptions(num_pages=600, page_size=PAGE),
        scheduler=SchedulerOptions(max_num_seqs=4, max_num_batched_tokens=BUDGET),
        tiers=TierOptions(disk, 10**8, 20.0),
        check_invariants=True,
        device="cpu",
        **options,
    )


@asynccontextmanager
async def running(checkpoint: Path, disk: Path | None, **options: Any) -> AsyncIterator[Engine]:
    engine = build_engine(config_of(checkpoint, disk, **options)).engine
    task = asyncio.create_task(engine.run())
    try:
        yield engine
        if engine.tier is not None:
            await settled(engine)
            assert not engine.lending.lent and not any(engine.tier.tally.failures.values())
    finally:
        task.cancel()
        await asyncio.wait({task})
        engine.executor.close()


@dataclass(frozen=True)
class Answer:
    tokens: list[int]
    logprobs: list[float]
    num_cached: int

    def same_bits(self, other: Answer) -> bool:
        return self.tokens == other.tokens and self.logprobs == other.logprobs


async def ask(engine: Engine, prompt: list[int], adapter: str | None = None) -> Answer:
    params = SamplingParams(max_tokens=COUNT, temperature=0.0, ignore_eos=True, logprobs=0)
    found = None if adapter is None or engine.adapters is None else await engine.adapters.get(adapter)
    async with engine.submit(Request("r", prompt, params, stream=False, adapter=found)) as stream:
        told = await stream.collect()
    assert told.error is None
    if engine.tier is not None:
        await settled(engine)
    return Answer(told.token_ids, [entry.logprob for entry in told.logprobs], stream.num_cached_tokens)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    tokens: list[int] = np.random.default_rng(seed).integers(3, 200, length).tolist()
    return tokens


@pytest.mark.parametrize("name", CASES)
async def test_a_restarted_server_goes_on(name: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """From the deepest place of a long prompt; from where two have parted; and its next turn behind the whole."""
    common = prompt_of(210)
    first, second, third = ([*common, *prompt_of(40, seed)] for seed in (1, 2, 3))
    async with running(checkpoints[name], None) as engine:
        cold = [await ask(engine, prompt) for prompt in (first, second, third)]
        later = [*first, *cold[0].tokens, *prompt_of(9, 4)]
        cold.append(await ask(engine, later))
    async with running(checkpoints[name], tmp_path) as engine:
        assert [await ask(engine, prompt) for prompt in (first, second)] == cold[:2]
    # A recurrent state is kept where chunks end, and where the second has left the way of the first.
    end = 208 if name == "state" else 248
    for prompt, expected, num_cached in ((first, cold[0], end), (third, cold[2], 208), (later, cold[3], end)):
        async with running(checkpoints[name], tmp_path) as engine:
            found = await ask(engine, prompt)
            assert found.same_bits(expected) and found.num_cached == num_cached
            assert engine.tier is not None and engine.tier.tally.hit_tokens == num_cached


async def test_what_windows_leave_is_not_written(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    async with running(checkpoints["windows"], tmp_path) as engine:
        await ask(engine, prompt_of(250))
        groups, count = engine.limits.groups, 250 // PAGE
        assert len(groups) == 4
        held = sum(count - group.behind(count * PAGE, PAGE) for group in groups)
        assert engine.tier is not None and len(engine.tier.store) == held < 2 * count


async def test_a_state_without_its_file_is_computed(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """The deepest is damaged, and found to be so as it comes; then the one before it serves."""
    prompt = prompt_of(230)
    async with running(checkpoints["state"], tmp_path) as engine:
        cold = await ask(engine, prompt)
        assert engine.tier is not None
        names, chain = engine.tier._names, engine.tier._names.chain(Request("r", prompt))[1]
        state = names._state(chain[3 * BUDGET // PAGE - 1])
        assert state in engine.tier.store
    path = tmp_path / state.hex()[:2] / f"{state.hex()[2:]}.page"
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    engine = build_engine(config_of(checkpoints["state"], tmp_path)).engine
    task = asyncio.create_task(engine.run())
    found = await ask(engine, prompt)
    assert found.same_bits(cold) and found.num_cached == 0
    assert engine.tier is not None and engine.tier.store.num_corrupt == 1 and engine.tier.tally.failures["read"] == 1
    assert state in engine.tier.store, "it is written anew"
    path.unlink()
    task.cancel()
    await asyncio.wait({task})
    engine.executor.close()
    async with running(checkpoints["state"], tmp_path) as engine:
        found = await ask(engine, prompt)
        assert found.same_bits(cold) and found.num_cached == 2 * BUDGET


@pytest.mark.parametrize("kept", [True, False])
async def test_what_drafts_goes_on_from_its_own_pages(
    kept: bool, checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model drafts for itself: it is always right where its keys and values came along, and only there. They are
    found by nobody whose drafts are made otherwise."""
    if not kept:
        monkeypatch.setattr(DraftModel, "pools", [])
    drafts = SpeculationOptions("draft_model", str(checkpoints["full"]), num_draft_tokens=3, adaptive=False)
    options: dict[str, Any] = {"seed": 1, "speculation": drafts}
    prompt = prompt_of(230)
    async with running(checkpoints["full"], None, seed=1) as engine:
        cold = await ask(engine, prompt)
    for num_cached in (0, 228):
        async with running(checkpoints["full"], tmp_path, **options) as engine:
            found = await ask(engine, prompt)
            assert found.same_bits(cold) and found.num_cached == num_cached
            counts = engine.scheduler.speculation
            assert counts is not None and counts.num_draft_tokens > 4
            right = counts.num_accepted_tokens == counts.num_draft_tokens
            assert right == (kept or not num_cached)
    async with running(checkpoints["full"], tmp_path, seed=1) as engine:
        assert (await ask(engine, prompt)).num_cached == 0
    options["speculation"] = dataclasses.replace(drafts, model=str(checkpoints["one window"]))
    async with running(checkpoints["full"], tmp_path, **options) as engine:
        found = await ask(engine, prompt)
        assert found.same_bits(cold) and found.num_cached == 0


async def test_adapters(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Found again under whatever name; loaded again with other weights, nothing of the old ones is seen."""
    model = load(checkpoints["full"], max_adapters=2)
    for number in (1, 2):
        write(tmp_path / f"a{number}", factors(model.adapted, number, number), r=number)
    prompt, lora = prompt_of(230), LoraOptions(enable=True, root=str(tmp_path), max_loras=2)
    async with running(checkpoints["full"], None, lora=lora) as engine:
        cold = [await ask(engine, prompt, name) for name in (None, "a1", "a2")]
    assert len({str(one.logprobs) for one in cold}) == 3
    async with running(checkpoints["full"], tmp_path / "kv", lora=lora) as engine:
        assert [await ask(engine, prompt, name) for name in ("a1", "a2")] == cold[1:]
    (tmp_path / "a1").rename(tmp_path / "b")
    (tmp_path / "a2").rename(tmp_path / "a1")
    async with running(checkpoints["full"], tmp_path / "kv", lora=lora) as engine:
        for name, expected, num_cached in ((None, cold[0], 0), ("a1", cold[2], 228), ("b", cold[1], 228)):
            found = await ask(engine, prompt, name)
            assert found.same_bits(expected) and found.num_cached == num_cached

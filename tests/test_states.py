"""Models with recurrent states: whole engine, real weights. What a prompt shares is computed once, states outlive
retraction and failed steps and are given back in sleep, and the start says what they take."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.books import check
from engine.build import build_engine
from engine.config import (
    CacheOptions,
    EngineConfig,
    ModelOptions,
    SchedulerOptions,
    SpeculationOptions,
    StartupError,
)
from engine.engine import Engine
from engine.executor.cpu import CPUExecutor
from engine.executor.start import describe_states, plan_states
from engine.forward import ForwardError, Limits
from engine.models.parts.decoder import CausalLM
from engine.models.registry import read_spec
from engine.ops.attention.base import AttentionBackend
from engine.request import FinishReason, Request, SamplingParams
from engine.speculation.base import Proposer
from tests.models.support import Runner, edit_json, load, make_checkpoint
from tests.speculation.guesses import Guesses

PAGE, CONTEXT, NEW_TOKENS = 4, 512, 24
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen3_5": {
        "num_hidden_layers": 3,
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 12,
        "linear_value_head_dim": 20,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    # Not one layer keeps keys and values.
    "Lfm2": {"layer_types": ["conv"] * 3, "block_multiple_of": 8},
}


EXPERTS = {
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 24,
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for family, sizes in FAMILIES.items():
        found[family] = tmp_path_factory.mktemp(family)
        make_checkpoint(found[family], family, max_position_embeddings=CONTEXT, **sizes)
    return found


class Watched:
    """A model that counts the prompt tokens it computes, and fails where it is told to."""

    def __init__(self, model: CausalLM) -> None:
        self._model = model
        self.config, self.attention_spec, self.logits = model.config, model.attention_spec, model.logits
        self.computed = 0
        self.fails_in: int | None = None

    def forward(
        self, token_ids: Tensor, positions: Tensor, attention: AttentionBackend, types: Tensor | None = None
    ) -> Tensor:
        self.computed += len(token_ids)
        if self.fails_in is not None:
            self.fails_in -= 1
        hidden = self._model.forward(token_ids, positions, attention, types)
        if self.fails_in == 0:
            # At the end: by then every layer has changed its states.
            raise ForwardError("was told to fail")
        return hidden


@asynccontextmanager
async def running(
    model: CausalLM,
    *,
    num_pages: int = 2000,
    max_num_seqs: int = 4,
    budget: int = 48,
    snapshots: int = 40,
    cache: bool = True,
    drafts: int = 0,
    overlap: bool = True,
    proposer: Proposer | None = None,
) -> AsyncIterator[tuple[Engine, Watched]]:
    watched = Watched(model)
    limits = Limits(
        *(max_num_seqs, budget, CONTEXT, PAGE, num_pages, model.config.vocab_size),
        num_snapshots=snapshots,
        max_draft_tokens=drafts,
    )
    config = EngineConfig(
        cache=CacheOptions(num_pages=num_pages, page_size=PAGE, enable_prefix_caching=cache),
        scheduler=SchedulerOptions(
            max_num_seqs=max_num_seqs, max_num_batched_tokens=budget, overlap=overlap, admission_watermark=0.0
        ),
        speculation=SpeculationOptions(adaptive=False),
    )
    executor = CPUExecutor(watched, limits, dtype=torch.float32, load=lambda _: watched, proposer=proposer)
    engine = Engine(config, executor, None)
    task = asyncio.create_task(engine.run())
    try:
        yield engine, watched
        while engine.scheduler.has_work:  # noqa: ASYNC110 -- an overrun
            await asyncio.sleep(0.001)
    finally:
        task.cancel()
        await asyncio.wait({task})
        engine.executor.close()
    check(engine.scheduler.kv_cache, [])


async def ask(engine: Engine, prompt: list[int], name: str = "r", count: int = NEW_TOKENS) -> list[int]:
    params = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
    async with engine.submit(Request(name, prompt, params, stream=False)) as stream:
        delta = await stream.collect()
    return delta.token_ids if delta.finish_reason is not FinishReason.ERROR else []


def prompts_of(lengths: list[int], seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 211, length).tolist() for length in lengths]


async def expected(model: CausalLM, prompts: list[list[int]], count: int = NEW_TOKENS) -> list[list[int]]:
    """Each alone, without a cache."""
    async with running(model, cache=False, snapshots=0) as (engine, _):
        answers = [await ask(engine, prompt, f"e{index}", count) for index, prompt in enumerate(prompts)]
    assert all(len(answer) == count for answer in answers), "a request failed"
    return answers


@pytest.mark.parametrize("family", FAMILIES)
async def test_a_common_prompt_is_computed_once(family: str, checkpoints: dict[str, Path]) -> None:
    """64 requests behind one system prompt, all at once; and the same again, which computes next to nothing."""
    model = load(checkpoints[family])
    [common], own = prompts_of([400]), prompts_of([3, 5, 9, 12] * 16, seed=1)
    prompts = [common + each for each in own]
    async with running(model, max_num_seqs=64, budget=192) as (engine, watched):
        await asyncio.gather(*(ask(engine, prompt, f"r{index}", 2) for index, prompt in enumerate(prompts)))
        own_tokens = sum(map(len, own)) + len(prompts)
        # Those that begin before the prompt's first chunks are through have less to go on from.
        assert watched.computed < 2 * len(common) + own_tokens + 64 * PAGE
        watched.computed = 0
        answers = [await ask(engine, prompt, f"s{index}", 2) for index, prompt in enumerate(prompts[:8])]
        assert watched.computed < 8 * (12 + 2 + 2 * PAGE)
    assert answers == await expected(model, prompts[:8], 2)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
async def test_rows_with_drafts(family: str, overlap: bool, checkpoints: dict[str, Path]) -> None:
    """Long answers, in a pool that is too small, with few snapshots and steps that fail: the same answers. Who goes on
    behind an answer finds a state that it has left, which no wrong draft is in."""
    model = load(checkpoints[family])
    prompts, count = prompts_of([40, 9, 25, 30]), 150
    answers = await expected(model, prompts, count)
    texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    follow = [[*text, 5, 6, 7] for text in texts]
    after = await expected(model, follow, 6)
    for num_pages, snapshots, fails in [(2000, 40, False), (110, 40, True), (80, 2, False)]:
        guesses = Guesses(texts, lambda place: place % 3 == 0)
        async with running(
            model, num_pages=num_pages, snapshots=snapshots, drafts=5, overlap=overlap, proposer=guesses
        ) as (engine, watched):
            engine.scheduler.snapshot_pages = 4
            watched.fails_in = 30 if fails else None
            found = await asyncio.gather(*(ask(engine, each, f"r{i}", count) for i, each in enumerate(prompts)))
            assert found == answers, (num_pages, snapshots)
            assert bool(engine.metrics.failed_steps) == fails
            watched.fails_in, watched.computed = None, 0
            for index in (3, 2, 1, 0):
                assert await ask(engine, follow[index], f"f{index}", 6) == after[index], (num_pages, snapshots)
            if num_pages == 2000:
                # Of each at most the pages between two snapshots, and what the drafts that were open may hide.
                assert watched.computed < 4 * (2 * 4 * PAGE + 3 + 6 * 6)
            speculation = engine.scheduler.speculation
            assert speculation is not None
            assert 0.3 < speculation.num_accepted_tokens / speculation.num_draft_tokens < 1
            assert speculation.num_accepted_tokens > (200 if num_pages == 2000 else 20)
        assert engine.scheduler.counters.num_preemptions or num_pages == 2000


@pytest.mark.parametrize("family", FAMILIES)
async def test_retraction_and_few_snapshots(family: str, checkpoints: dict[str, Path]) -> None:
    """A pool that is too small for all, and fewer snapshots than there would be places for: the same answers."""
    model = load(checkpoints[family])
    prompts = prompts_of([40, 9, 25, 30])
    prompts.append([*prompts[0][:33], 5, 6])
    answers = await expected(model, prompts, 40)
    retractions = 0
    for num_pages, snapshots, cache in [(30, 40, True), (30, 1, True), (30, 0, False)]:
        async with running(model, num_pages=num_pages, snapshots=snapshots, cache=cache) as (engine, _):
            for turn in range(2):
                found = await asyncio.gather(*(ask(engine, each, f"{turn}-{i}", 40) for i, each in enumerate(prompts)))
                assert found == answers, (num_pages, snapshots, cache, turn)
        retractions += engine.scheduler.counters.num_preemptions
    assert retractions > 0


async def test_a_failed_step_leaves_no_state_behind(checkpoints: dict[str, Path]) -> None:
    model = load(checkpoints["Qwen3_5"])
    prompts = prompts_of([100, 9, 61])
    prompts.append([*prompts[0][:90], 5, 6])
    answers = await expected(model, prompts)
    async with running(model) as (engine, watched):
        for fails_in in range(1, 9):
            watched.fails_in = fails_in
            found = await asyncio.gather(*(ask(engine, each, f"{fails_in}-{i}") for i, each in enumerate(prompts)))
            assert all(mine in ([], theirs) for mine, theirs in zip(found, answers, strict=True)), fails_in
            watched.fails_in = None
            again = await asyncio.gather(*(ask(engine, each, f"{fails_in}-{i}a") for i, each in enumerate(prompts)))
            assert again == answers, fails_in
        # Most of these are tried again with all that was in them.
        assert engine.metrics.failed_steps >= 8


async def test_sleep_gives_states_back(checkpoints: dict[str, Path]) -> None:
    model = load(checkpoints["Qwen3_5"])
    prompts = prompts_of([60, 20])
    answers = await expected(model, prompts)
    async with running(model) as (engine, _):
        states = engine.executor._states  # type: ignore[attr-defined]
        for _ in range(2):
            assert [await ask(engine, each) for each in prompts] == answers
            await engine.sleep(1)
            assert states._memory.numel() == 0
            await engine.wake_up()


def test_the_start_says_what_states_take(checkpoints: dict[str, Path]) -> None:
    model = ModelOptions(path=str(checkpoints["Qwen3_5"]), load_format="dummy", dtype="float32")

    def rows(**options: Any) -> dict[str, str]:
        cache = CacheOptions(num_pages=64, **options)
        built = build_engine(
            EngineConfig(model=model, cache=cache, scheduler=SchedulerOptions(max_num_seqs=8), device="cpu")
        )
        built.engine.executor.close()
        assert built.engine.limits.num_snapshots == (128 if cache.enable_prefix_caching else 0)
        return dict(built.report.rows)

    each = 2 * (4 * 12 * 20 * 4 + -(-3 * (2 * 2 * 12 + 4 * 20) * 4 // 64) * 64)
    assert rows()["states"] == describe_states(each, 8, 128, 8)
    assert "sequences and 0 snapshots" in rows(enable_prefix_caching=False)["states"]


def test_sequences_that_do_not_fit() -> None:
    """151 MiB a sequence, as a hybrid model of 27B has them."""
    each = 151 << 20
    # Half of the cache's memory is theirs.
    assert plan_states(each, CacheOptions(), 256, 16 << 30) == (54, 27)
    text = describe_states(each, 54, 27, 256)
    assert text.startswith("151 MiB a sequence: up to 11.9 GiB for 54 sequences (not 256: ") and "27 snapshots" in text
    assert plan_states(each, CacheOptions(kv_cache_bytes=4 << 30), 8, 16 << 30) == (8, 6)
    with pytest.raises(
        StartupError, match=r"^the recurrent states of --max-num-seqs 20 take 2.95 GiB, 151 MiB a .* 13 would fit$"
    ):
        plan_states(each, CacheOptions(kv_cache_bytes=4 << 30), 20, 16 << 30)
    with pytest.raises(StartupError, match=r"not one fits; --kv-cache-gb gives them more$"):
        plan_states(each, CacheOptions(kv_cache_bytes=1 << 20), 8, 16 << 30)


@pytest.mark.parametrize(
    ("family", "changes", "problem"),
    [
        (
            "Qwen3_5",
            {"layer_types": ["linear_attention", "mamba", "full_attention"]},
            "layer_types must hold linear_att",
        ),
        ("Qwen3_5", {"linear_num_key_heads": 3}, r"linear_num_key_heads \(3\) must divide"),
        ("Qwen3_5", {"linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim must be an integer from 2"),
        ("Qwen3_5", {"hidden_act": "gelu_pytorch_tanh"}, "hidden_act must be one of silu"),
        ("Qwen3_5", {"attn_output_gate": False}, "attn_output_gate is false"),
        ("Lfm2", {"layer_types": ["conv", "conv"]}, "layer_types must be a list of num_hidden_layers = 3"),
        ("Lfm2", {"layer_types": ["conv", "conv", "sliding_attention"]}, "layer_types must hold conv or full_att"),
        ("Lfm2", {"conv_L_cache": 0}, "conv_L_cache must be"),
    ],
)
def test_bad_fields(
    family: str, changes: dict[str, Any], problem: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    path.write_bytes((checkpoints[family] / "config.json").read_bytes())
    edit_json(path, **changes)
    with pytest.raises(StartupError, match=rf"config.json: {problem}"):
        read_spec(tmp_path)


def test_experts_in_two_tensors(tmp_path: Path) -> None:
    """Qwen 3.5 with experts has gate and up of all of a layer's experts in one tensor on the hub."""
    make_checkpoint(tmp_path, "Qwen3_5Moe", **FAMILIES["Qwen3_5"], **EXPERTS)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    prompt = prompts_of([20])[0]
    expected = Runner(load(tmp_path)).logits(prompt, 20)
    for layer in range(3):
        prefix = f"model.layers.{layer}.mlp.experts."
        each = [
            {name: tensors.pop(f"{prefix}{n}.{name}_proj.weight") for name in ("gate", "up", "down")} for n in range(5)
        ]
        tensors[f"{prefix}gate_up_proj"] = torch.stack([torch.cat([one["gate"], one["up"]]) for one in each])
        tensors[f"{prefix}down_proj"] = torch.stack([one["down"] for one in each])
    save_file(tensors, path, {"format": "pt"})
    assert torch.equal(Runner(load(tmp_path)).logits(prompt, 20), expected)
    tensors[f"{prefix}gate_up_proj"] = tensors[f"{prefix}gate_up_proj"].mT.contiguous()
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(StartupError, match=r"gate_up_proj has shape \[5, 48, 40\], config.json asks for \[5, 40, 48\]"):
        load(tmp_path)

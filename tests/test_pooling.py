"""Vectors through the whole engine on tiny random models, against transformers: whatever surrounds a request."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from engine.build import build_engine
from engine.config import CacheOptions, EngineConfig, ModelOptions, SchedulerOptions, StartupError
from engine.engine import Engine
from engine.executor.cpu import CPUExecutor
from engine.forward import Limits
from engine.models.parts.decoder import CausalLM
from engine.ops.invariance import promise
from engine.request import ContextLengthExceededError, FinishReason, Pooling, Request, SamplingParams
from engine.scheduling.sequence import Sequence
from tests.models.support import SIZES, load, make_checkpoint, prompts_of
from tests.models.test_abilities import LAST, sentence_transformers
from tests.text import kinds

VOCAB, WIDTH = SIZES["vocab_size"], SIZES["hidden_size"]
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen3": {"head_dim": 16},
    # Windows, soft caps, and norms with an offset.
    "Gemma2": {"head_dim": 16, "sliding_window": 9, "query_pre_attn_scalar": 24},
}
KINDS = [Pooling("last"), Pooling("mean"), Pooling("logprobs", (17, 3, 40))]
SETUPS: dict[str, dict[str, Any]] = {
    "whole": {"max_num_batched_tokens": 512, "enable_prefix_caching": False},
    "depth 1": {"overlap": False},
    "small chunks": {"max_num_batched_tokens": 16},
    "odd chunks": {"max_num_batched_tokens": 37},
    "warm": {"rounds": 2},
    # A prompt gets one or two tokens of each step, while the texts beside it grow.
    "retraction": {"num_pages": 40, "max_num_batched_tokens": 6, "max_num_seqs": 6},
}

Vector = npt.NDArray[np.float32]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[CausalLM, Any]]:
    found = {}
    for family, sizes in FAMILIES.items():
        directory = tmp_path_factory.mktemp(family)
        reference = make_checkpoint(directory, family, **sizes)
        found[family] = load(directory, deterministic=True), reference
    return found


async def vectors_of(
    model: CausalLM,
    prompts: list[list[int]],
    *,
    max_num_seqs: int = 16,
    max_num_batched_tokens: int = 128,
    num_pages: int = 400,
    overlap: bool = True,
    enable_prefix_caching: bool = True,
    rounds: int = 1,
) -> tuple[list[list[Vector]], Engine, int]:
    """Every prompt's vector of every kind, all at once and among requests that generate; of the last round. And how
    often a request for a vector was retracted."""
    limits = Limits(max_num_seqs, max_num_batched_tokens, 128, 4, num_pages, VOCAB)
    executor = CPUExecutor(model, limits, dtype=torch.float32)
    config = EngineConfig(
        cache=CacheOptions(page_size=4, enable_prefix_caching=enable_prefix_caching),
        scheduler=SchedulerOptions(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            overlap=overlap,
            admission_watermark=0.0,
        ),
    )
    engine = Engine(config, executor, None)
    task = asyncio.create_task(engine.run())
    retractions: list[int] = []

    async def ask(name: str, prompt: list[int], pooling: Pooling) -> Vector:
        request = Request(name, prompt, SamplingParams(temperature=0.0), False, pooling=pooling)
        async with engine.submit(request) as stream:
            sequence: Sequence = engine.publisher.listeners[name].sequence
            delta = await stream.collect()
        retractions.append(sequence.num_retractions)
        assert delta.finish_reason is FinishReason.STOP and delta.token_ids == [] and delta.text == ""
        assert stream.num_prompt_tokens == len(prompt) and stream.num_output_tokens == 0
        assert stream.num_cached_tokens == 0 or pooling.kind != "mean"
        assert stream.pooled is not None
        return stream.pooled

    async def generate(number: int) -> list[int]:
        params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
        async with engine.submit(Request(f"g{number}", prompts[number][:9], params)) as stream:
            return (await stream.collect()).token_ids

    try:
        for turn in range(rounds):
            asking = [
                ask(f"{turn}-{number}-{pooling.kind}", prompt, pooling)
                for number, prompt in enumerate(prompts)
                for pooling in KINDS
            ]
            texts, flat = await asyncio.gather(asyncio.gather(*map(generate, range(4))), asyncio.gather(*asking))
            assert all(len(text) == 40 for text in texts)
        await engine.drained()
        assert engine.scheduler.kv_cache.num_available == num_pages
        found = [flat[at : at + len(KINDS)] for at in range(0, len(flat), len(KINDS))]
        return found, engine, sum(retractions)
    finally:
        task.cancel()
        await asyncio.wait({task})
        executor.close()


@torch.inference_mode()
def reference_vectors(reference: Any, prompt: list[int]) -> list[Vector]:
    hidden = reference.model(torch.tensor([prompt])).last_hidden_state[0]
    logits = reference(torch.tensor([prompt])).logits[0, -1].float()
    shares = torch.log_softmax(logits, -1)[list(KINDS[2].token_ids)]
    return [hidden[-1].numpy(), hidden.mean(dim=0).numpy(), shares.numpy()]


def make_prompts() -> list[list[int]]:
    """Some share a beginning; one has a single token, one fills the context."""
    shared = prompts_of([21], seed=4)[0]
    own = prompts_of([34, 1, 17, 40, 9, 128], seed=5)
    return [own[0], own[1], shared + own[2], shared + own[3], shared, own[4], own[5]]


@pytest.mark.parametrize("family", FAMILIES)
async def test_vectors_are_those_of_transformers(family: str, models: dict[str, tuple[CausalLM, Any]]) -> None:
    model, reference = models[family]
    prompts = make_prompts()
    promised, _ = promise(model.linears, model.attention_spec, torch.float32)
    first: list[list[Vector]] | None = None
    for name, setup in SETUPS.items():
        found, engine, num_retracted = await vectors_of(model, prompts, **setup)
        for prompt, vectors in zip(prompts, found, strict=True):
            for ours, theirs in zip(vectors, reference_vectors(reference, prompt), strict=True):
                assert ours.dtype == np.float32 and ours.shape == theirs.shape
                assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max(), (name, len(prompt))
        # The same bits, too, wherever they are promised.
        first = first or found
        if promised:
            for one, other in zip(first, found, strict=True):
                assert all(a.tobytes() == b.tobytes() for a, b in zip(one, other, strict=True)), name
        assert (num_retracted > 0) == (name == "retraction"), (name, num_retracted)
        counters = engine.scheduler.counters
        assert (counters.prefix_cache_hits > 0) == (name != "whole")


async def test_inputs_that_do_not_fit(models: dict[str, tuple[CausalLM, Any]]) -> None:
    """A vector needs no room for a token behind its prompt, but all of the prompt in the cache."""
    for num_pages, most in ((400, 128), (5, 20)):
        limits = Limits(4, 64, 128, 4, num_pages, VOCAB)
        executor = CPUExecutor(models["Llama"][0], limits, dtype=torch.float32)
        engine = Engine(EngineConfig(cache=CacheOptions(page_size=4)), executor, None)
        task = asyncio.create_task(engine.run())
        try:
            long = prompts_of([most + 1])[0]
            nothing = SamplingParams(temperature=0.0)
            with pytest.raises(ContextLengthExceededError, match=f"maximum context length is {most} tokens"):
                engine.submit(Request("a", long, nothing, pooling=Pooling("mean")))
            async with engine.submit(Request("b", long[:-1], nothing, pooling=Pooling("mean"))) as stream:
                assert (await stream.collect()).finish_reason is FinishReason.STOP
        finally:
            task.cancel()
            await asyncio.wait({task})
            executor.close()


# ---- from a directory


def embedding_directory(directory: Path, *, bare: bool) -> Any:
    """As Qwen3-Embedding is, with a tokenizer; returns transformers' model."""
    reference = make_checkpoint(directory / "whole", "Qwen3", head_dim=16, vocab_size=512)
    (reference.model if bare else reference).save_pretrained(directory)
    sentence_transformers(directory, "Pooling", "Normalize", pooling=LAST)
    kinds.write("byte_level", directory)
    return reference


@pytest.mark.parametrize("bare", [True, False])
async def test_a_directory_that_says_how_is_served_for_it(bare: bool, tmp_path: Path) -> None:
    """The output layer, where there is one, is not loaded."""
    reference = embedding_directory(tmp_path, bare=bare)
    if not bare:
        # Nor is a causal model asked for an output layer that nobody uses.
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["architectures"] == ["Qwen3ForCausalLM"] and not config["tie_word_embeddings"]
    model = ModelOptions(path=str(tmp_path), dtype="float32")
    built = build_engine(EngineConfig(model=model, cache=CacheOptions(num_pages=64), device="cpu"))
    task = asyncio.create_task(built.engine.run())
    try:
        assert dict(built.report.rows)["gives"] == f"embeddings (last pooling, {WIDTH} numbers, length 1)"
        assert built.model_config.headless and not built.abilities.generates
        prompt = prompts_of([20])[0]
        request = Request("a", prompt, SamplingParams(temperature=0.0), pooling=Pooling("last"))
        async with built.engine.submit(request) as stream:
            await stream.collect()
        with torch.inference_mode():
            expected = reference.model(torch.tensor([prompt])).last_hidden_state[0, -1].numpy()
        assert stream.pooled is not None
        assert np.abs(stream.pooled - expected).max() <= 1e-4 * np.abs(expected).max()
    finally:
        task.cancel()
        await asyncio.wait({task})
        built.engine.executor.close()


def test_scores_need_a_template(tmp_path: Path) -> None:
    embedding_directory(tmp_path, bare=False)
    spelled = kinds.load("byte_level").id_to_token(40)
    assert spelled is not None
    model = ModelOptions(path=str(tmp_path), score_tokens=(spelled, spelled))
    with pytest.raises(StartupError, match=r"scores by tokens need a chat template; --chat-template gives one"):
        build_engine(EngineConfig(model=model, cache=CacheOptions(num_pages=64), device="cpu"))

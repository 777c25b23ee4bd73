"""A request's tokens and log-probabilities are the same bits whatever surrounds it; nothing here is approximate.

The whole engine (scheduler, executor, streams) runs the demo model and six random families under settings that
cover every pair of what the promise names: company, chunks, prefix cache, depth, retraction, threads, streaming,
drafts.
Without the native kernels (the fast mode where nothing is promised) greedy tokens still agree in float32.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import engine.demo
from engine.build import build_engine
from engine.config import (
    CacheOptions,
    EngineConfig,
    ModelOptions,
    SchedulerOptions,
    SpeculationOptions,
    StartupError,
    StreamOptions,
)
from engine.engine import Engine
from engine.executor.cpu import CPUExecutor
from engine.flags import parse
from engine.forward import Limits
from engine.models.loading.load import load_model
from engine.models.parts.decoder import CausalLM
from engine.models.registry import read_spec
from engine.ops import native
from engine.request import Request, SamplingParams
from engine.scheduling.sequence import Sequence
from engine.stream import TokenLogprob
from engine.text.tokenizer import Tokenizer
from tests.models.support import make_checkpoint
from tests.speculation.guesses import Guesses

DEMO = Path(engine.demo.__path__[0])
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen3": {"head_dim": 16},
    # Windows in every other layer, soft caps, float32 norms, and a vocabulary that no vector length divides.
    "Gemma2": {"head_dim": 16, "sliding_window": 9, "query_pre_attn_scalar": 24},
    "Mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 21},
    # A recurrent state in two layers of three.
    "Qwen3_5": {
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 12,
        "linear_value_head_dim": 20,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    # Mamba 2 beside attention, and short convolutions.
    "GraniteMoeHybrid": {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "shared_intermediate_size": 56,
        "num_local_experts": 0,
        "mamba_n_heads": 8,
        "mamba_d_state": 20,
        "embedding_multiplier": 12.0,
        "logits_scaling": 8.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.1,
        "tie_word_embeddings": True,
    },
    "Lfm2": {"layer_types": ["conv", "full_attention", "conv"], "block_multiple_of": 8},
}
MODELS = ["demo", *FAMILIES]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

CONTEXT, COMPANY, NEW_TOKENS = 96, 64, 8
FACTORS: dict[str, tuple[Any, ...]] = {
    "company": (False, True),
    "chunk": ("whole", "odd", "small"),
    "cache": ("off", "cold", "warm"),
    "depth": (1, 2),
    "pool": ("ample", "tiny"),
    "threads": (1, 2),
    "stream": ("no", "every token", "late"),
    # Right ones, wrong ones and both in one row.
    "drafts": (0, 4),
}


@dataclass(frozen=True)
class Setting:
    company: bool
    chunk: str
    cache: str
    depth: int
    pool: str
    threads: int
    stream: str
    drafts: int

    def budget(self) -> int:
        """Tokens of a step. One of a page or two leaves small odd chunks; beside 64 rows it must hold a token each."""
        alone = {"whole": 512, "odd": 23, "small": 5}
        return {"whole": 512, "odd": 101, "small": COMPANY}[self.chunk] if self.company else alone[self.chunk]


PLAIN = Setting(False, "whole", "off", 1, "ample", 1, "no", 0)


def pairs(setting: Setting) -> set[tuple[tuple[str, Any], tuple[str, Any]]]:
    return set(itertools.combinations([(name, getattr(setting, name)) for name in FACTORS], 2))


@functools.cache
def covering() -> list[Setting]:
    """Few settings in which any two values of two factors meet; greedy, and the same at every run."""
    everything = [Setting(*values) for values in itertools.product(*FACTORS.values())]
    missing = set().union(*map(pairs, everything))
    chosen = []
    while missing:
        best = max(everything, key=lambda setting: len(pairs(setting) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def test_settings_cover_every_pair() -> None:
    assert len(covering()) <= 14
    for one, other in itertools.combinations(FACTORS, 2):
        met = {(getattr(setting, one), getattr(setting, other)) for setting in covering()}
        assert met == set(itertools.product(FACTORS[one], FACTORS[other]))


# ---- the requests

GREEDY, SEEDED = {"temperature": 0.0}, {"temperature": 1.1, "seed": 77}
PROBES: list[tuple[int, dict[str, Any]]] = [  # prompt length, sampling
    (1, {**GREEDY, "logprobs": 0}),
    (17, {**GREEDY, "logprobs": 4}),
    (40, {**SEEDED, "logprobs": 2}),
    (61, {**SEEDED, "top_p": 0.8, "logprobs": 1}),
    (33, {**SEEDED, "top_k": 30, "min_p": 0.01}),
    (48, {**GREEDY, "repetition_penalty": 1.4, "frequency_penalty": 0.3, "logprobs": 1}),
    (26, {**GREEDY, "prompt_logprobs": 2, "logprobs": 0}),
    (64, {**GREEDY}),
]


def make_requests(vocab: int) -> tuple[list[Request], list[Request]]:
    """The probes, and others of all kinds; most prompts share a beginning."""
    generator = np.random.default_rng(3)
    common = generator.integers(3, vocab, 24).tolist()

    def prompt(length: int, shared: bool) -> list[int]:
        own = generator.integers(3, vocab, length).tolist()
        return (common + own)[:length] if shared else own

    def request(name: str, ids: list[int], count: int, values: dict[str, Any]) -> Request:
        return Request(name, ids, SamplingParams(max_tokens=count, ignore_eos=True, **values))

    probes = [
        request(f"probe-{index}", prompt(length, index % 3 > 0), NEW_TOKENS, values)
        for index, (length, values) in enumerate(PROBES)
    ]
    others = []
    for index in range(COMPANY - 1):
        values = [GREEDY, {**SEEDED, "seed": index}, {**GREEDY, "logprobs": 3, "presence_penalty": 0.5}][index % 3]
        length, count = int(generator.integers(1, 33)), int(generator.integers(1, NEW_TOKENS + 4))
        others.append(request(f"other-{index}", prompt(length, index % 2 > 0), count, values))
    return probes, others


@dataclass
class Answer:
    """All that a client can see of a request. num_cached, num_retractions: how it came to be."""

    token_ids: list[int]
    text: str
    logprobs: list[TokenLogprob]
    prompt_logprobs: list[TokenLogprob] | None
    num_cached: int
    num_retractions: int

    def seen(self) -> tuple[object, ...]:
        return self.token_ids, self.text, self.logprobs, self.prompt_logprobs


# ---- the engine


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {"demo": DEMO}
    for family, sizes in FAMILIES.items():
        found[family] = tmp_path_factory.mktemp(family)
        make_checkpoint(found[family], family, **sizes)
    return found


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def load(directory: Path, dtype: torch.dtype, *, deterministic: bool) -> CausalLM:
    config, cpu = read_spec(directory), torch.device("cpu")
    return load_model(config, directory, dtype=dtype, device=cpu, max_model_len=CONTEXT, deterministic=deterministic)


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.load(DEMO)


async def answers_of(
    model: CausalLM,
    dtype: torch.dtype,
    setting: Setting,
    kv_dtype: torch.dtype | None = None,
    known: dict[str, Answer] | None = None,
) -> dict[str, Answer]:
    """Every probe's answer, each alone in an idle engine; or those of all in one burst of COMPANY requests. known: what
    drafts are made of."""
    torch.set_num_threads(setting.threads)
    probes, others = make_requests(model.config.vocab_size)
    # Tiny: little more than the longest request needs, or a tenth of the burst; small pages, so that rows ask often.
    page_size = 4 if setting.pool == "ample" else 2
    num_tokens = 64 * CONTEXT if setting.pool == "ample" else 256 if setting.company else 80
    num_pages = num_tokens // page_size
    max_num_seqs = COMPANY if setting.company else 4
    limits = Limits(
        *(max_num_seqs, setting.budget(), CONTEXT, page_size, num_pages, model.config.vocab_size),
        num_snapshots=40 if model.config.has_state else None,
        max_draft_tokens=setting.drafts,
    )
    texts = [probe.prompt_token_ids + (known or {})[probe.request_id].token_ids for probe in probes if known]
    generator = np.random.default_rng(4)
    guesses = Guesses(texts, lambda _: generator.random() < 0.4)  # two of five
    config = EngineConfig(
        cache=CacheOptions(page_size=page_size, enable_prefix_caching=setting.cache != "off"),
        scheduler=SchedulerOptions(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=setting.budget(),
            overlap=setting.depth == 2,
            # Nothing kept free for those that run: they are retracted instead.
            admission_watermark=0.0 if setting.pool == "tiny" else 0.05,
        ),
        stream=StreamOptions(flush_interval_ms=1e6 if setting.stream == "late" else 0.0),
        # On a busy machine no draft may pay: there are some all the same.
        speculation=SpeculationOptions(adaptive=False),
    )
    executor = CPUExecutor(model, limits, dtype=dtype, kv_dtype=kv_dtype, proposer=guesses)
    whole = Engine(config, executor, tokenizer() if model.config.vocab_size > 1000 else None)
    task = asyncio.create_task(whole.run())
    found: dict[str, Answer] = {}

    async def ask(request: Request) -> None:
        values = {name: getattr(request, name) for name in ("request_id", "prompt_token_ids", "sampling")}
        async with whole.submit(Request(**values, stream=setting.stream != "no")) as stream:
            sequence: Sequence = whole.publisher.listeners[request.request_id].sequence
            delta = await stream.collect()
        assert delta.error is None
        found[request.request_id] = Answer(
            delta.token_ids,
            delta.text,
            delta.logprobs,
            stream.prompt_logprobs,
            stream.num_cached_tokens,
            sequence.num_retractions,
        )

    try:
        for _ in range(2 if setting.cache == "warm" else 1):
            if not setting.company:
                for probe in probes:
                    await ask(probe)
                continue
            burst = [*probes, *others[: COMPANY - len(probes)]]
            order = np.random.default_rng(5).permutation(COMPANY)
            await asyncio.gather(*(ask(burst[index]) for index in order))
        if native.library() is not None:
            assert all(step.threads == setting.threads for step in executor._attention._steps)  # type: ignore[union-attr]
        if limits.max_draft_tokens and known:
            speculation = whole.scheduler.speculation
            assert speculation is not None
            assert 0 < speculation.num_accepted_tokens < speculation.num_draft_tokens
    finally:
        task.cancel()
        await asyncio.wait({task})
        executor.close()
    return found


def check_it_happened(setting: Setting, answers: dict[str, Answer], *, has_state: bool) -> None:
    """The setting did what it is there for."""
    cached = sum(answer.num_cached for name, answer in answers.items() if name.startswith("probe"))
    retracted = sum(answer.num_retractions for answer in answers.values())
    if setting.cache == "off":
        assert cached == 0
    elif setting.cache == "warm" and setting.pool == "ample":
        # Where there is a state, prompts go on from snapshots of it alone.
        assert cached > (100 if has_state else 200)
    crowded = setting.company and setting.pool == "tiny"
    assert (retracted > 0) == crowded or (has_state and crowded)


# ---- the promise


@pytest.mark.parametrize(
    ("name", "dtype", "kv_dtype"),
    [
        *itertools.product(MODELS, DTYPES, (None,)),
        # A cache of fewer bits where there are windows, too.
        ("Gemma2", "bfloat16", torch.int8),
        ("Gemma2", "float32", torch.bfloat16),
        ("demo", "float32", torch.float16),
    ],
)
async def test_same_bits(name: str, dtype: str, kv_dtype: torch.dtype | None, checkpoints: dict[str, Path]) -> None:
    model = load(checkpoints[name], DTYPES[dtype], deterministic=True)
    expected = await answers_of(model, DTYPES[dtype], PLAIN, kv_dtype)
    for answer in expected.values():
        assert len(answer.token_ids) == NEW_TOKENS
    assert [len(answer.logprobs) for answer in expected.values()] == [
        NEW_TOKENS if "logprobs" in values else 0 for _, values in PROBES
    ]
    assert len(expected["probe-6"].prompt_logprobs or ()) == PROBES[6][0] - 1
    for setting in covering():
        answers = await answers_of(model, DTYPES[dtype], setting, kv_dtype, expected)
        for probe, answer in expected.items():
            assert answers[probe].seen() == answer.seen(), (probe, setting)
        check_it_happened(setting, answers, has_state=model.config.has_state)


# A recurrence by torch's chunks takes its time; tests/ops compare it.
@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("Qwen3_5", "GraniteMoeHybrid")])
async def test_fast_mode_has_the_same_greedy_tokens(name: str, checkpoints: dict[str, Path]) -> None:
    """torch's own kernels sum in orders that depend on the batch; float32 leaves greedy tokens as they are."""
    with native.disabled():
        model = load(checkpoints[name], torch.float32, deterministic=False)
        assert {linear.kind for linear in model.linears} == {"torch"}
        expected = await answers_of(model, torch.float32, PLAIN)
        for setting in covering()[:6]:
            answers = await answers_of(model, torch.float32, setting, known=expected)
            for (probe, answer), (_, values) in zip(sorted(expected.items()), PROBES, strict=True):
                if values["temperature"] == 0.0:
                    assert answers[probe].token_ids == answer.token_ids, (probe, setting)


# ---- the flag


def test_flag() -> None:
    spellings = {(): None, ("--deterministic",): True, ("--enable-deterministic-inference",): True}
    for argv, expected in spellings.items():
        assert parse(argv)[0].deterministic is expected


def build(checkpoint: Path, **options: Any) -> str:
    """The row of the start-up table."""
    model = ModelOptions(path=str(checkpoint), load_format="dummy", dtype=options.pop("dtype", "float32"))
    built = build_engine(EngineConfig(model=model, cache=CacheOptions(num_pages=8), device="cpu", **options))
    built.engine.executor.close()
    return dict(built.report.rows)["deterministic"]


def test_start_says_what_is_promised(checkpoints: dict[str, Path]) -> None:
    if native.library() is not None:
        for deterministic in (None, True):
            assert build(checkpoints["Mixtral"], deterministic=deterministic) == "yes (native kernels)"
    with native.disabled() if native.library() is not None else contextlib.nullcontext():
        assert build(checkpoints["Qwen3"]).startswith("no (no native kernels: ")
        with pytest.raises(StartupError, match=r"^--deterministic cannot be promised here: no native kernels: "):
            build(checkpoints["Qwen3"], deterministic=True)
    with pytest.raises(StartupError, match=r"^--deterministic cannot be promised here: no native kernels"):
        build(checkpoints["Qwen3"], deterministic=True, dtype="float16")

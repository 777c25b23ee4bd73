"""CUDAExecutor on a GPU: parity with the CPU, graphs, overlap, no waiting, memory. No plugin needed: asyncio.run."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.config import CacheOptions, SpeculationOptions
from engine.executor.cpu import CPUExecutor
from engine.executor.cuda import CUDAExecutor
from engine.executor.cuda_device import CapturesOver, CudaDevice, Graph
from engine.executor.cuda_graph import GraphKey
from engine.executor.cuda_start import build_cuda_encoder, build_cuda_executor
from engine.forward import ForwardError
from engine.models.parts.decoder import CausalLM
from engine.ops import native
from engine.ops.experts import mix_experts, torch_mix_experts
from engine.ops.skinny import BLOCKS, skinny_product, torch_skinny_product
from engine.request import Request, SamplingParams
from engine.speculation.registry import make_proposer
from tests.cuda.fake_device import FakeDevice
from tests.cuda.support import DenseAttention, expected_tokens, serve
from tests.cuda.test_encoders import ENCODERS, vectors
from tests.cuda.test_encoders import LIMITS as ENCODER_LIMITS
from tests.executor.driver import GREEDY, Driver, decode, prefill
from tests.gpu.support import HAS_FLASHINFER, LIMITS, OUR_ATTENTION, executor, families, load, load_config

pytestmark = pytest.mark.gpu
CPU = torch.device("cpu")
PROMPT = [(37 * i + 11) % 990 + 3 for i in range(75)]
PAGES = {1: [5, 9, 2, 30, 31, 32, 33, 34]}


def captured_logits(model: CausalLM) -> list[Tensor]:
    """Every logits that the model computes from now on."""
    found: list[Tensor] = []
    logits = model.raw_logits

    def noting(hidden: Tensor) -> Tensor:
        result = logits(hidden)
        found.append(result.detach().clone())
        return result

    model.raw_logits = noting  # type: ignore[method-assign]
    return found


def reference_logits(model: CausalLM, context: list[int]) -> Tensor:
    with torch.inference_mode():
        hidden = model.forward(torch.tensor(context), torch.arange(len(context)), DenseAttention(model, len(context)))
        return model.logits(hidden)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.float().cpu() - theirs.float()).norm() / theirs.float().norm())


ATTENTIONS = ["torch", *(["auto", "wrapper"] if HAS_FLASHINFER else [])]


@pytest.mark.parametrize("architecture", [*families(), *sorted(OUR_ATTENTION)])
@pytest.mark.parametrize(("dtype", "attention"), [("float32", "torch"), *(("bfloat16", a) for a in ATTENTIONS)])
def test_parity_with_the_cpu(layer: CudaDevice, architecture: str, dtype: str, attention: str) -> None:
    """A prompt in two chunks, then eager decode steps: the logits of each against one dense pass on the CPU."""
    kind = getattr(torch, dtype)
    model, reference = load(architecture, kind, layer.device), load(architecture, kind, CPU)
    found = captured_logits(model)
    engine = executor(layer, model, kind, attention=attention, cuda_graph="off")
    driver = Driver(engine)

    async def run() -> list[int]:
        await driver.run([prefill(1, PROMPT[:40], samples=False)], PAGES, {1: GREEDY})
        tokens = await driver.run([prefill(1, PROMPT[40:], start=40)])
        for position in range(len(PROMPT), len(PROMPT) + 12):
            tokens += await driver.run([decode(1, position)])
        return tokens

    tokens = asyncio.run(run())
    engine.close()
    expected = reference_logits(reference, PROMPT + tokens)[len(PROMPT) - 1 : -1]
    ours = torch.cat(found)[:, : expected.shape[1]]
    assert len(ours) == len(expected)
    # A router that rounds otherwise may pick another expert for a token: then that row is another answer, not a wrong
    # one, so of rows that went through experts the middle one counts.
    errors = [relative_error(mine, theirs) for mine, theirs in zip(ours, expected, strict=True)]
    error = float(np.median(errors)) if model.config.experts else relative_error(ours, expected)
    assert error < (1e-3 if dtype == "float32" else 4e-2), f"off by {error:.1e}"
    if dtype == "float32":
        assert tokens == expected.argmax(-1).tolist()


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_encoders(layer: CudaDevice, name: str, dtype: str) -> None:
    """Whole texts of several lengths: their vectors against the CPU's."""
    kind, config = getattr(torch, dtype), {**ENCODERS[name], "hidden_size": 512, "head_dim": 128}
    model, reference = load_config(config, kind, layer.device), load_config(config, kind, CPU)
    classify = reference.config.classifier is not None
    on_cpu = CPUExecutor(reference, ENCODER_LIMITS, dtype=kind)
    expected = asyncio.run(vectors(on_cpu, classify))
    on_cpu.close()
    on_gpu = build_cuda_encoder(model, layer, ENCODER_LIMITS, dtype=kind)
    found = asyncio.run(vectors(on_gpu, classify))
    on_gpu.close()
    for ours, theirs in zip(found, expected, strict=True):
        error = relative_error(torch.from_numpy(ours), torch.from_numpy(theirs))
        assert error < (1e-3 if dtype == "float32" else 4e-2), f"off by {error:.1e}"


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_a_graph_computes_what_eager_computes(layer: CudaDevice, attention: str, rows: int) -> None:
    """Bit for bit where the batch needs no padding; the same tokens where it does."""
    model = load("LlamaForCausalLM", torch.bfloat16, layer.device)
    outputs = []
    for mode in ("off", "start"):
        engine = executor(layer, model, torch.bfloat16, attention=attention, cuda_graph=mode)
        if mode == "start":
            engine.capture_at_start()
        driver = Driver(engine)

        async def run(driver: Driver = driver) -> list[list[int]]:
            prompts = {slot: PROMPT[: 6 * slot] for slot in range(1, rows + 1)}
            pages = {slot: list(range(1 + 16 * (slot - 1), 1 + 16 * slot)) for slot in prompts}
            hot = SamplingParams(temperature=0.8, seed=3)
            out = [
                await driver.run(
                    [prefill(slot, p) for slot, p in prompts.items()],
                    pages,
                    {slot: GREEDY if slot % 2 else hot for slot in prompts},
                )
            ]
            for step in range(40):
                continuing = [decode(slot, len(p) + step) for slot, p in prompts.items()]
                out += [await driver.run(continuing)]
            return out

        outputs.append(asyncio.run(run()))
        assert (engine.graphs.num_replays > 0) == (mode == "start")
        engine.close()
    same = np.mean(np.array(outputs[0]) == np.array(outputs[1]))
    assert same == 1.0 if rows in (1, 8) else same > 0.8, f"{same:.0%} of the tokens are the same"


def requests(count: int, tokens: int = 40) -> list[Request]:
    rng = np.random.default_rng(1)
    return [
        Request(
            f"r{i}",
            rng.integers(3, 990, int(rng.integers(1, 120))).tolist(),
            SamplingParams(max_tokens=tokens, temperature=0.0 if i % 2 else 1.0, seed=i, ignore_eos=True),
        )
        for i in range(count)
    ]


def test_sameness_in_float32(layer: CudaDevice) -> None:
    """Overlap on and off, graphs lazy, at start and off: one answer, and it is the CPU's."""
    model, reference = (load("LlamaForCausalLM", torch.float32, device) for device in (layer.device, CPU))
    asked = requests(12, 20)
    expected = [expected_tokens(reference, request) for request in asked]
    for mode in ("lazy", "start", "off"):
        for overlap in (True, False):
            engine = executor(layer, model, torch.float32, attention="torch", cuda_graph=mode)
            if mode == "start":
                engine.capture_at_start()
            assert asyncio.run(serve(engine, asked, overlap=overlap)) == expected, (mode, overlap)


def test_penalties_bans_and_filters_are_the_cpus(layer: CudaDevice) -> None:
    """Steps that draw by operations of their own, beside plain ones, against the same executor on the fake device."""
    asked = requests(8, 20)
    changes: list[dict[str, Any]] = [
        {"repetition_penalty": 1.3},
        {"frequency_penalty": 0.5, "presence_penalty": -0.5},
        {"logit_bias": ((7, 5.0), (9, -50.0))},
        {"bad_words": ((11,), (3, 5))},
        {"top_k": 20, "top_p": 0.9},
        {"min_p": 0.05, "logprobs": 3},
        {"allowed_token_ids": tuple(range(100, 400)), "prompt_logprobs": 2},
        {},
    ]
    asked = [
        dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, **change))
        for request, change in zip(asked, changes, strict=True)
    ]
    answers = []
    for device in (layer, FakeDevice(0)):
        with native.disabled():  # the fake device knows torch's operations alone
            model = load("LlamaForCausalLM", torch.float32, device.device)
        engine = executor(device, model, torch.float32, attention="torch")  # type: ignore[arg-type]
        answers.append(asyncio.run(serve(engine, asked)))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_overlap_in_bfloat16(layer: CudaDevice, attention: str) -> None:
    """Other batches round otherwise, so a few tokens may differ; first tokens and lengths may not."""
    model = load("LlamaForCausalLM", torch.bfloat16, layer.device)
    asked = requests(12)
    on, off = (
        asyncio.run(serve(executor(layer, model, torch.bfloat16, attention=attention), asked, overlap=overlap))
        for overlap in (True, False)
    )
    assert [len(tokens) for tokens in on] == [len(tokens) for tokens in off]
    agreement = np.mean([a == b for x, y in zip(on, off, strict=True) for a, b in zip(x, y, strict=True)])
    print(f"agreement of overlap on and off in bf16: {agreement:.1%}")
    assert np.mean([x[0] == y[0] for x, y in zip(on, off, strict=True)]) > 0.8


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "MixtralForCausalLM", "Gemma2ForCausalLM"])
def test_nothing_on_the_loop_waits_for_the_device(layer: CudaDevice, architecture: str, attention: str) -> None:
    """200 steps, prompts among them, while every synchronising call of torch raises."""
    model = load(architecture, torch.bfloat16, layer.device)
    engine = executor(layer, model, torch.bfloat16, attention=attention)
    driver = Driver(engine)

    async def run() -> None:
        await driver.run([prefill(1, PROMPT[:40])], PAGES, {1: GREEDY})
        await driver.run([prefill(2, PROMPT[:40]), prefill(3, PROMPT)], {2: [40, 41, 42], 3: [50, 51, 52, 53, 54]})
        for position in range(40, 44):  # warm up and capture
            await driver.run([decode(1, position)])
        torch.cuda.set_sync_debug_mode("error")
        waiting: list[Any] = []
        position = 44
        for step in range(200):
            if step % 25 == 24:
                rows, pages = [prefill(2, PROMPT[: 10 + step % 30])], {2: [40, 41, 42]}
            else:
                rows, pages = [decode(1, position % 100)], None
                position += 1
            waiting.append(driver.launch(rows, pages, {2: GREEDY} if pages else None))
            if len(waiting) == 2:
                await driver.wait(waiting.pop(0))
        await driver.wait(waiting.pop(0))
        torch.cuda.set_sync_debug_mode("default")

    asyncio.run(run())
    assert engine.graphs.num_replays > 150
    engine.close()


def take_what_is_left(layer: CudaDevice, engine: CUDAExecutor) -> list[Tensor]:
    """What the allocator still has for the compute stream in blocks that are partly used."""
    hoard: list[Tensor] = []
    with layer.on(engine._compute):
        for size in (2**20, 2**16, 2**12, 512):
            with contextlib.suppress(torch.OutOfMemoryError):
                while True:
                    hoard.append(torch.empty(size, dtype=torch.uint8, device=layer.device))
    return hoard


def test_a_batch_without_memory_fails_alone(layer: CudaDevice) -> None:
    model = load("LlamaForCausalLM", torch.bfloat16, layer.device)
    engine = executor(layer, model, torch.bfloat16, attention="torch", cuda_graph="off")
    driver = Driver(engine)

    async def run() -> None:
        first = await driver.run([prefill(1, PROMPT[:40])], PAGES, {1: GREEDY})
        assert 0 <= first[0] < 1000
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1e-6)  # the allocator refuses, the device is left alone
        hoard = take_what_is_left(layer, engine)
        with pytest.raises(ForwardError, match="memory"):
            await driver.run([prefill(2, PROMPT)], {2: [50, 51, 52, 53, 54]}, {2: GREEDY})
        torch.cuda.set_per_process_memory_fraction(1.0)
        hoard.clear()
        second = await driver.run([decode(1, 40)])
        assert 0 <= second[0] < 1000

    try:
        asyncio.run(run())
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        engine.close()


def test_an_invalidated_capture_costs_graphs_alone(layer: CudaDevice) -> None:
    """Its memory can still be given back, and steps go on as they are; what was captured before is replayed; random
    numbers can be drawn."""
    model = load("LlamaForCausalLM", torch.bfloat16, layer.device)
    engine = executor(layer, model, torch.bfloat16, attention="torch")
    driver = Driver(engine)

    def looking() -> None:
        torch.zeros(1, device=layer.device).item()

    async def run() -> list[int]:
        await driver.run([prefill(1, PROMPT[:40])], PAGES, {1: GREEDY})
        tokens = []
        for position in range(40, 46):
            tokens += await driver.run([decode(1, position)])
        replays = engine.graphs.num_replays
        assert replays > 0
        with layer.on(engine._compute), pytest.raises(CapturesOver):
            layer.capture(looking)
        assert layer.free_memory() > 0
        assert torch.randn(2, device=layer.device).isfinite().all()
        for position in range(46, 50):
            tokens += await driver.run([decode(1, position)])
        assert engine.graphs.num_replays > replays
        engine.sleep(1)
        engine.wake_up()
        return tokens + await driver.run([prefill(2, PROMPT[:40])], {2: [40, 41, 42]}, {2: GREEDY})

    tokens = asyncio.run(run())
    engine.close()
    assert all(0 <= token < 1000 for token in tokens)


@pytest.mark.skipif(not HAS_FLASHINFER, reason="fp8 is compared through FlashInfer")
def test_fp8_cache_stays_close(layer: CudaDevice) -> None:
    model, reference = (load("LlamaForCausalLM", torch.bfloat16, d) for d in (layer.device, CPU))
    found = captured_logits(model)
    engine = executor(layer, model, torch.bfloat16, kv_dtype=torch.float8_e4m3fn, cuda_graph="off")
    tokens = asyncio.run(Driver(engine).run([prefill(1, PROMPT)], PAGES, {1: GREEDY}))
    engine.close()
    expected = reference_logits(reference, PROMPT + tokens)[len(PROMPT) - 1 : -1]
    assert relative_error(found[-1], expected) < 0.15


@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("shape", [(3072, 2048), (128256, 2048), (16384, 2048), (4096, 14336)])
def test_skinny_products_of_real_shapes(layer: CudaDevice, shape: tuple[int, int], rows: int) -> None:
    weight = torch.randn(shape, device=layer.device).bfloat16() * shape[1] ** -0.5
    x = torch.randn(rows, shape[1], device=layer.device).bfloat16()
    for activation in (None, "silu"):
        expected = torch_skinny_product(x, weight, None, activation)
        for blocks in BLOCKS:
            error = relative_error(skinny_product(x, weight, None, blocks, activation).cpu(), expected.cpu())
            assert error < 5e-3, f"blocks of {blocks}: off by {error:.1e}"


@pytest.mark.parametrize("tokens", [1, 3, 64, 500, 3000])
@pytest.mark.parametrize(("hidden", "inner", "count", "chosen"), [(2048, 768, 128, 8), (4096, 2048, 8, 2)])
def test_experts_of_real_shapes(
    layer: CudaDevice, tokens: int, hidden: int, inner: int, count: int, chosen: int
) -> None:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=layer.device).bfloat16() * shape[-1] ** -0.5

    x, logits = normal(tokens, hidden) * hidden**0.5, torch.randn(tokens, count, device=layer.device)
    arguments = (x, logits, normal(count, 2 * inner, hidden), normal(count, hidden, inner), chosen, "silu")
    ours = mix_experts(*arguments, normalize=True)
    error = relative_error(ours.cpu(), torch_mix_experts(*arguments, normalize=True).cpu())
    assert error < 1e-2, f"off by {error:.1e}"


def test_chosen_products_change_no_first_token(layer: CudaDevice) -> None:
    model = load("LlamaForCausalLM", torch.bfloat16, layer.device)
    answers = []
    for choose in (False, True):
        engine = executor(layer, model, torch.bfloat16)
        if choose:
            ours, shapes = engine.choose_products()
            print(f"{ours} of {shapes} products of few rows are ours")
            assert shapes == 3 * 5
        found = captured_logits(model)
        driver = Driver(engine)

        async def run(driver: Driver = driver) -> list[int]:
            tokens = await driver.run([prefill(1, PROMPT)], PAGES, {1: GREEDY})
            return tokens + await driver.run([decode(1, len(PROMPT))])

        tokens = asyncio.run(run())
        engine.close()
        answers.append((tokens[0], found[-1]))
    assert answers[0][0] == answers[1][0]
    assert relative_error(answers[1][1], answers[0][1].cpu()) < 2e-2


@pytest.mark.parametrize(("dtype", "attention"), [("float32", "torch"), *(("bfloat16", a) for a in ATTENTIONS)])
def test_drafts_change_no_text(layer: CudaDevice, dtype: str, attention: str) -> None:
    """What the answer was, as a prediction, then with every fourth token of it wrong.

    In bfloat16 a step's kernels depend on its rows, and of two tokens that are nearly as likely either may be taken:
    then the rest is another text, so there it is asked for a common beginning.
    """
    kind = getattr(torch, dtype)
    model, asked = load("LlamaForCausalLM", kind, layer.device), requests(6)
    asked = [dataclasses.replace(each, sampling=dataclasses.replace(each.sampling, temperature=0.0)) for each in asked]
    plain = executor(layer, model, kind, attention=attention)
    expected = asyncio.run(serve(plain, asked))
    speculation = SpeculationOptions(method="ngram", num_draft_tokens=7, adaptive=False)
    for wrong in (False, True):
        predictions = [[1 if wrong and place % 4 == 3 else t for place, t in enumerate(each)] for each in expected]
        told = [dataclasses.replace(one, prediction=tuple(each)) for one, each in zip(asked, predictions, strict=True)]
        limits, proposer = dataclasses.replace(LIMITS, max_draft_tokens=7), make_proposer(speculation)
        engine = executor(layer, model, kind, attention=attention, limits=limits, proposer=proposer)
        capture, captured = engine.graphs.capture, set()

        def noting(key: GraphKey, work: Callable[[], object]) -> Graph | None:
            captured.add(key.side)  # noqa: B023 - called before the next turn
            return capture(key, work)  # noqa: B023

        engine.graphs.capture = noting  # type: ignore[method-assign]
        found = asyncio.run(serve(engine, told, speculation=speculation))
        assert engine.num_steps < (1.0 if wrong else 0.6) * plain.num_steps, (engine.num_steps, plain.num_steps)
        assert captured & {2, 3}, "steps with drafts ran without graphs"
        if dtype == "float32":
            assert found == expected
        pairs = [zip(ours, theirs, strict=True) for ours, theirs in zip(found, expected, strict=True)]
        same = [next((at for at, (a, b) in enumerate(pair) if a != b), 40) for pair in pairs]
        print(f"{dtype} {attention}: {engine.num_steps} steps for {plain.num_steps}, tokens in common: {same}")
        assert sum(same) > 6 * 5


@pytest.mark.parametrize("cuda_graph", ["lazy", "start"])
def test_the_start_divides_the_memory_and_serves(layer: CudaDevice, cuda_graph: str) -> None:
    """What `make serve` does on a GPU, without HTTP."""
    model = load("LlamaForCausalLM", torch.bfloat16, layer.device)
    rows: dict[str, str] = {}
    engine = build_cuda_executor(
        model,
        layer,
        CacheOptions(memory_fraction=0.3),
        dtype=torch.bfloat16,
        max_num_seqs=8,
        max_num_batched_tokens=256,
        max_model_len=256,
        cuda_graph=cuda_graph,
        row=rows.__setitem__,
    )
    for name, text in rows.items():
        print(f"{name}: {text}")
    pool = engine.limits.num_pages * 16 * model.attention_spec.kv_bytes_per_token(torch.bfloat16)
    assert 0.05 < pool / layer.total_memory() < 0.35
    answers = asyncio.run(serve(engine, requests(12)))
    assert all(len(tokens) == 40 for tokens in answers) and engine.graphs.num_replays > 0


def test_limits_fit() -> None:
    assert max(max(pages) for pages in PAGES.values()) <= LIMITS.num_pages

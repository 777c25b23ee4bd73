"""Every kind of adapter that a GPU serves: logits are peft's in float32, and tokens of any mix those of the CPU."""

from __future__ import annotations

import asyncio
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.executor.cuda import CUDAExecutor
from engine.executor.cuda_adapters import DeviceAdapters
from engine.lora.reader import read_adapter
from engine.lora.words import AdapterError
from engine.models.loading.adapted import AdaptedLayers
from engine.models.parts import experts
from engine.models.parts.decoder import CausalLM
from engine.ops import native
from engine.request import Adapter, Pooling, Request, SamplingParams
from tests.cuda.fake_device import FakeDevice
from tests.cuda.ordered_device import OrderedDevice
from tests.cuda.support import SMALL, TINY, _reference_hidden, expected_tokens, make_executor, serve, tiny_model
from tests.cuda.test_adapters import CAPACITY, asked, in_layers
from tests.cuda.test_order import read_results
from tests.lora import test_families, test_options
from tests.lora.handmade import PREFIX, factors, write
from tests.lora.support import IDS, check, save, theirs, wrapped
from tests.models.support import Runner, load, make_checkpoint, relative_error

# Of the others a GPU computes none.
KINDS = [name for name in test_options.OPTIONS if name != "layer-saved"]


@pytest.mark.parametrize("name", KINDS)
def test_logits_are_pefts(name: str, tmp_path: Path) -> None:
    family, sizes, options = test_options.OPTIONS[name]
    agree(tmp_path, family, {**sizes, "num_hidden_layers": 2}, **options)


# Experts as a GPU has them, one tensor: beside a shared one, of a clamped activation, chosen by other scores.
EXPERTS: dict[str, dict[str, Any]] = {
    name: test_families.STACKED.get(name, {}) for name in ("qwen2moe", "qwen3moe", "mixtral", "gptoss", "glm4moe")
}


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_are_pefts(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "keeps_experts_stacked", lambda device: True)
    family, sizes = test_families.ALL[name]
    stacked = EXPERTS[name]
    agree(tmp_path, family, sizes, **({"target_modules": ["q_proj"], **stacked} if stacked else {}))


def agree(directory: Path, family: str, sizes: dict[str, Any], **options: Any) -> None:
    """As tests.lora.support has it, of what a GPU would add."""
    reference = make_checkpoint(directory / "base", family, **sizes)
    base = theirs(reference)
    adapted = wrapped(reference, **options)
    path = save(adapted, directory / "adapter")
    model = load(directory / "base", max_adapters=2)
    layer: Any = FakeDevice()
    with layer.may_block():
        adapters = DeviceAdapters(model, layer, 64, 64, room_mib=16)
    weights = adapters.read(path, model.adapted)
    with layer.may_block(), layer.on(layer.stream()):
        adapters._upload(2, weights)
        layer.synchronize_all()
    expected = theirs(adapted)
    with adapters.used_by(2, 8):
        check(Runner(model, num_seqs=1).logits(IDS, 8), expected, base)
    for nobodys in (0, 1):
        with adapters.used_by(nobodys, 8):
            assert relative_error(Runner(model, num_seqs=1).logits(IDS, 8), base) < 1e-4


# Of a model with biases, as Qwen 2 has them.
MODEL = {**TINY, "architectures": ["Qwen2ForCausalLM"]}


def a_model() -> CausalLM:
    return tiny_model.__wrapped__(json.dumps(MODEL), max_adapters=CAPACITY)


def layers_of(model: CausalLM) -> AdaptedLayers:
    assert isinstance(model.adapted, AdaptedLayers)
    return model.adapted


def some_tensors(layers: AdaptedLayers, number: int, outer: bool) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Of adapter 1, 2, ... and its config: magnitudes, biases alone, or both and biases of factors. outer: of what
    lies around the layers instead: factors, rows of some tokens, whole matrices."""
    if outer:
        return around(number)
    generator = torch.Generator().manual_seed(number)
    modules = [name for name in in_layers(layers) if number != 2 or "q_proj" in name]
    tensors = factors(layers, 2 + number, number, modules)
    magnitudes, biases, of_factors = number != 2, number != 1, number == 3
    for name in modules:
        count = layers.places[name].count
        if magnitudes:
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = torch.rand(count, generator=generator) + 0.5
        if biases and name.endswith(("q_proj", "v_proj")):
            tensors[f"{PREFIX}{name}.base_layer.bias"] = torch.randn(count, generator=generator)
        if of_factors:
            tensors[f"{PREFIX}{name}.lora_B.bias"] = torch.randn(count, generator=generator) * 0.1
    if number == 2:
        tensors = {name: value for name, value in tensors.items() if name.endswith(".bias")}
    rank = 2 + number
    return tensors, {"r": rank, "lora_alpha": 2 * rank, "use_dora": magnitudes}


def around(number: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Factors of both; rows of a few tokens in the one, factors of the other; or a whole matrix for each."""
    generator = torch.Generator().manual_seed(number)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.4

    vocab, width, rank = MODEL["vocab_size"], MODEL["hidden_size"], 2 + number
    table, output = f"{PREFIX}model.embed_tokens.", f"{PREFIX}lm_head."
    config: dict[str, Any] = {"r": rank, "lora_alpha": 2 * rank}
    factored = {f"{output}lora_A.weight": some(rank, width), f"{output}lora_B.weight": some(vocab, rank)}
    if number == 1:
        looked_up = {f"{table}lora_embedding_A": some(rank, vocab), f"{table}lora_embedding_B": some(width, rank)}
        return factored | looked_up, config
    if number == 2:
        config["trainable_token_indices"] = {"embed_tokens": list(range(60, 10, -3)), "lm_head": [7, 99, 4]}
        delta = "token_adapter.trainable_tokens_delta"
        return {f"{table}{delta}": some(17, width), f"{output}{delta}": some(3, width)} | factored, config
    return {f"{table}weight": some(vocab, width), f"{output}weight": some(vocab, width)}, config


def read(executor: CUDAExecutor, folder: Path, outer: bool) -> list[Adapter]:
    """Three of them."""
    adapters = []
    for number in (1, 2, 3):
        tensors, config = some_tensors(layers_of(a_model()), number, outer)
        path = write(folder / f"a{number}", tensors, **config)
        weights = executor.read_adapter(path)
        adapters.append(Adapter(path.name, str(path), number, weights.rank, weights.num_bytes, weights, weights.digest))
    return adapters


@functools.cache
def reference(folder: Path, number: int) -> CausalLM:
    """The model as the CPU computes it, all rows of which have one adapter."""
    model = a_model()
    if number:
        layers = layers_of(model)
        layers.put(1, read_adapter(folder / f"a{number}", layers, 8).branches)
        layers.rows.use(1)
    return model


@pytest.mark.parametrize(
    ("attention", "graph", "seed", "outer"),
    [("wrapper", "lazy", 1, True), ("xqa", "start", 2, False), ("xqa", "start", 2, True), ("torch", "off", 3, False)],
)
async def test_a_mix_of_all_kinds(attention: str, graph: str, seed: int, outer: bool, tmp_path: Path) -> None:
    device = OrderedDevice(seed) if graph == "lazy" else FakeDevice(seed)
    executor = make_executor(SMALL, device=device, attention=attention, cuda_graph=graph, model=a_model())
    if graph == "start":
        executor.capture_at_start()
    requests = asked(read(executor, tmp_path, outer), seed)
    if isinstance(device, OrderedDevice):
        read_results(executor, device)
    tokens = await asyncio.wait_for(serve(executor, requests), 60)
    for request, got in zip(requests, tokens, strict=True):
        version = request.adapter.version if request.adapter else 0
        assert got == expected_tokens(reference(tmp_path, version), request), version
    assert not isinstance(device, OrderedDevice) or not device.found


async def test_prompts_are_scored_with_their_adapters(tmp_path: Path) -> None:
    """Log-probabilities of prompts and of single tokens, some rows with and some without, in steps of several."""
    executor = make_executor(SMALL, device=FakeDevice(5), model=a_model())
    adapters = [None, *read(executor, tmp_path, True)]
    engine = Engine(EngineConfig(), executor, None)
    task = asyncio.create_task(engine.run())
    prompt = [5, 17, 30, 60, 99, 7, 4, 33, 21]
    wanted = {}
    for version in range(4):
        with torch.inference_mode(), native.disabled():
            model = reference(tmp_path, version)
            wanted[version] = torch.log_softmax(model.logits(_reference_hidden(model, prompt)), -1)

    async def ask(adapter: Adapter | None) -> None:
        version = 0 if adapter is None else adapter.version
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
        async with engine.submit(Request(f"p{version}", prompt, params, stream=False, adapter=adapter)) as stream:
            await stream.collect()
            told = [each.logprob for each in stream.prompt_logprobs if each is not None]
        known = wanted[version]
        assert told[-8:] == pytest.approx([float(known[at, prompt[at + 1]]) for at in range(8)], abs=1e-4)
        scored = Pooling("logprobs", token_ids=(3, 7, 99))
        request = Request(f"v{version}", prompt, SamplingParams(max_tokens=1), pooling=scored, adapter=adapter)
        async with engine.submit(request) as stream:
            await stream.collect()
            assert list(stream.pooled) == pytest.approx(known[-1, [3, 7, 99]].tolist(), abs=1e-4)

    await asyncio.wait_for(asyncio.gather(*(ask(adapter) for adapter in adapters)), 60)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    executor.close()


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    """A whole matrix needs more than factors; --max-lora-mib is the room of each."""
    model = a_model()
    layer: Any = FakeDevice()
    path = write(tmp_path / "a3", *around(3)[:1], **around(3)[1])
    with layer.may_block():
        small, large = (DeviceAdapters(model, layer, 8, 64, room_mib=mib) for mib in (0.01, 0.1))
    with pytest.raises(AdapterError, match=r"^adapter a3: it takes more than the 0.0 MiB .* \(--max-lora-mib\)$"):
        small.read(path, model.adapted)
    assert large.read(path, model.adapted).num_bytes > 2 * 101 * 32 * 4


MIXTURE = {
    **TINY,
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


@pytest.mark.parametrize(("graph", "seed"), [("off", 1), ("lazy", 2)])
async def test_a_mix_at_experts(graph: str, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of each expert are many adapters' and nobody's, in graphs; as the CPU, which has them one by one."""

    def read_model() -> CausalLM:
        return tiny_model.__wrapped__(json.dumps(MIXTURE), max_adapters=CAPACITY)

    apart = [read_model() for _ in range(4)]
    monkeypatch.setattr(experts, "keeps_experts_stacked", lambda device: True)
    model = read_model()
    device = OrderedDevice(seed) if graph == "off" else FakeDevice(seed)
    executor = make_executor(SMALL, device=device, cuda_graph=graph, model=model, room_mib=0.2)
    adapters = []
    for number in (1, 2, 3):
        layers = layers_of(apart[number])
        names = [name for name in in_layers(layers) if number != 2 or ".experts.1." in name]
        path = write(tmp_path / f"a{number}", factors(layers, 3, number, names), r=3, lora_alpha=9)
        layers.put(1, read_adapter(path, layers, 8).branches)
        layers.rows.use(1)
        weights = executor.read_adapter(path)
        adapters.append(Adapter(path.name, str(path), number, weights.rank, weights.num_bytes, weights, weights.digest))
    requests = asked(adapters, seed)
    tokens = await asyncio.wait_for(serve(executor, requests), 60)
    for request, got in zip(requests, tokens, strict=True):
        version = request.adapter.version if request.adapter else 0
        assert got == expected_tokens(apart[version], request), version
    assert graph == "off" or device.counts["capture"]
    assert not isinstance(device, OrderedDevice) or not device.found

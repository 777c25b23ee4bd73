"""Every kind of adapter that a GPU serves: logits are peft's in float32, and tokens of any mix those of the CPU."""

from __future__ import annotations

import asyncio
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.executor.cuda_adapters import DeviceAdapters
from engine.lora.reader import read_adapter
from engine.models.loading.adapted import AdaptedLayers
from engine.models.parts.decoder import CausalLM
from engine.request import Adapter
from tests.cuda.fake_device import FakeDevice
from tests.cuda.ordered_device import OrderedDevice
from tests.cuda.support import SMALL, TINY, expected_tokens, make_executor, serve, tiny_model
from tests.cuda.test_adapters import CAPACITY, asked, in_layers
from tests.cuda.test_order import read_results
from tests.lora import test_options
from tests.lora.handmade import PREFIX, factors, write
from tests.lora.support import IDS, check, save, theirs, wrapped
from tests.models.support import Runner, load, make_checkpoint, relative_error

KINDS = [name for name in test_options.OPTIONS if "dora" in name or "bias" in name]


@pytest.mark.parametrize("name", KINDS)
def test_logits_are_pefts(name: str, tmp_path: Path) -> None:
    family, sizes, options = test_options.OPTIONS[name]
    agree(tmp_path, family, {**sizes, "num_hidden_layers": 2}, **options)


def agree(directory: Path, family: str, sizes: dict[str, Any], **options: Any) -> None:
    """As tests.lora.support has it, of what a GPU would add."""
    reference = make_checkpoint(directory / "base", family, **sizes)
    base = theirs(reference)
    adapted = wrapped(reference, **options)
    path = save(adapted, directory / "adapter")
    model = load(directory / "base", max_adapters=2)
    layer: Any = FakeDevice()
    with layer.may_block():
        adapters = DeviceAdapters(model, layer, 64, 64)
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


def some_tensors(layers: AdaptedLayers, number: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Of adapter 1, 2, ... and its config: magnitudes, biases alone, or both and biases of factors."""
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
    ("attention", "graph", "seed"), [("wrapper", "lazy", 1), ("xqa", "start", 2), ("torch", "off", 3)]
)
async def test_a_mix_of_all_kinds(attention: str, graph: str, seed: int, tmp_path: Path) -> None:
    model = a_model()
    device = OrderedDevice(seed) if graph == "lazy" else FakeDevice(seed)
    executor = make_executor(SMALL, device=device, attention=attention, cuda_graph=graph, model=model)
    if graph == "start":
        executor.capture_at_start()
    adapters = []
    for number in (1, 2, 3):
        tensors, config = some_tensors(layers_of(a_model()), number)
        path = write(tmp_path / f"a{number}", tensors, **config)
        weights = executor.read_adapter(path)
        adapters.append(Adapter(path.name, str(path), number, weights.rank, weights.num_bytes, weights, weights.digest))
    requests = asked(adapters, seed)
    if isinstance(device, OrderedDevice):
        read_results(executor, device)
    tokens = await asyncio.wait_for(serve(executor, requests), 60)
    for request, got in zip(requests, tokens, strict=True):
        version = request.adapter.version if request.adapter else 0
        assert got == expected_tokens(reference(tmp_path, version), request), version
    assert not isinstance(device, OrderedDevice) or not device.found

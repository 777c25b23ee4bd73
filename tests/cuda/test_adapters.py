"""LoRA adapters by the CUDA executor, on the fake device: tokens are those of a model with the factors merged in."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import CacheOptions, StartupError
from engine.executor import cuda_adapters
from engine.executor.cuda import CUDAExecutor
from engine.executor.cuda_adapters import _shape, site_shapes
from engine.executor.cuda_buffers import CudaHandle, Side
from engine.executor.cuda_graph import GraphKey
from engine.executor.cuda_start import build_cuda_executor
from engine.forward import ForwardError, ForwardInput
from engine.lora.words import AdapterError
from engine.models.loading.adapted import AdaptedLayers, Place
from engine.models.parts.decoder import CausalLM
from engine.ops.lora_device import SiteShape
from engine.request import Adapter, Request
from tests.cuda.fake_device import FakeDevice
from tests.cuda.ordered_device import OrderedDevice
from tests.cuda.support import (
    HYBRID,
    SMALL,
    TINY,
    expected_tokens,
    make_executor,
    reference_next,
    requests_of,
    serve,
    tiny_directory,
    tiny_model,
)
from tests.cuda.test_order import read_results
from tests.executor.driver import GREEDY, Driver, decode, prefill
from tests.lora.handmade import factors, write

MODELS: dict[str, dict[str, Any]] = {
    "llama": TINY,
    "interleaved": {
        **TINY,
        "architectures": ["CohereForCausalLM"],
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
    "states": HYBRID,
}
CAPACITY = 2


def in_layers(layers: AdaptedLayers) -> list[str]:
    """Modules of the decoder's layers."""
    return [name for name in layers.places if name.startswith("model.layers.")]


@functools.cache
def a_model(name: str) -> CausalLM:
    return tiny_model(json.dumps(MODELS[name]), max_adapters=CAPACITY)


@functools.cache
def tensors_of(name: str, number: int) -> dict[str, torch.Tensor]:
    return some_tensors(a_model(name), number)


def some_tensors(model: CausalLM, number: int) -> dict[str, torch.Tensor]:
    """Of adapter 1, 2, ...: all layers, the first half of them, or all but those of queries."""
    layers = model.adapted
    assert isinstance(layers, AdaptedLayers)
    modules = in_layers(layers)
    chosen = {1: modules, 2: modules[: len(modules) // 2], 3: [each for each in modules if "q_proj" not in each]}
    return factors(layers, 2 + number, number, chosen[number])


@functools.cache
def merged(name: str, number: int) -> CausalLM:
    """The model with an adapter's B A in its weights; 0 for none."""
    model = tiny_model.__wrapped__(json.dumps(MODELS[name]), max_adapters=CAPACITY)
    return merge(model, tensors_of(name, number) if number else {})


def merge(model: CausalLM, tensors: dict[str, torch.Tensor]) -> CausalLM:
    """Twice what the factors come to is added to the model's weights."""
    layers = model.adapted
    assert isinstance(layers, AdaptedLayers)
    for key, down in tensors.items():
        if ".lora_A" not in key:
            continue
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        place = layers.places[module]
        added = torch.zeros(place.linear.out_features, place.linear.in_features)
        added[place.first : place.first + place.count] = tensors[key.replace("lora_A", "lora_B")] @ down * 2
        if place.order is not None:
            added[: len(place.order)] = added[place.order].clone()
        place.linear._weight += added  # type: ignore[union-attr]
    return model


def adapters_of(name: str, executor: CUDAExecutor, folder: Path, count: int = 3) -> list[Adapter]:
    return read(executor, folder, [tensors_of(name, number) for number in range(1, count + 1)])


def read(executor: CUDAExecutor, folder: Path, adapters: Sequence[dict[str, torch.Tensor]]) -> list[Adapter]:
    """Adapters 1, 2, ..., as they are merged."""
    found = []
    for number, tensors in enumerate(adapters, 1):
        rank = 2 + number
        path = write(folder / f"a{number}", tensors, r=rank, lora_alpha=2 * rank)
        weights = executor.read_adapter(path)
        found.append(Adapter(path.name, str(path), number, weights.rank, weights.num_bytes, weights, weights.digest))
    return found


def asked(adapters: Sequence[Adapter], seed: int = 1, count: int = 9) -> list[Request]:
    """Some with each adapter and some with none; more adapters than there is room for."""
    choice = [None, *adapters]
    return [
        dataclasses.replace(request, adapter=choice[number % len(choice)])
        for number, request in enumerate(requests_of(seed, count))
    ]


def expected(name: str, request: Request) -> list[int]:
    return expected_tokens(merged(name, request.adapter.version if request.adapter else 0), request)


@pytest.mark.parametrize(
    ("name", "attention", "graph"),
    [("llama", "wrapper", "lazy"), ("llama", "xqa", "start"), ("llama", "torch", "off")]
    + [(name, "torch", "lazy") for name in MODELS if name != "llama"],
)
async def test_rows_of_many_adapters_and_of_none(name: str, attention: str, graph: str, tmp_path: Path) -> None:
    device = FakeDevice(7)
    limits = dataclasses.replace(SMALL, num_snapshots=3) if name == "states" else SMALL
    executor = make_executor(limits, device=device, attention=attention, cuda_graph=graph, model=a_model(name))
    if graph == "start":
        executor.capture_at_start()
    families = set()
    find = executor.graphs.get

    def noting(key: GraphKey) -> Any:
        graph = find(key)
        families.add((key.adapted, graph is not None))
        return graph

    executor.graphs.get = noting  # type: ignore[method-assign]
    # Chains of graphs for the first prompts already.
    executor.pieces._seen.update((size, adapted) for size in executor.pieces.sizes for adapted in (False, True))
    chains = executor.pieces._chains = dict(executor.pieces._chains)
    executor.pieces.clear = lambda: None  # type: ignore[method-assign]
    requests = asked(adapters_of(name, executor, tmp_path))
    tokens = await asyncio.wait_for(serve(executor, requests), 60)
    assert tokens == [expected(name, request) for request in requests]
    assert ((True, True) in families) == (graph != "off")
    assert any(adapted for _, adapted in chains) == (graph != "off" and name != "states")


async def test_adapters_come_and_go_while_steps_are_in_flight(tmp_path: Path) -> None:
    """Every access is ordered: what a step still reads is not written over, and memory outlives the copies from it."""
    device = OrderedDevice(1)
    executor = make_executor(SMALL, device=device, model=a_model("llama"))
    requests = asked(adapters_of("llama", executor, tmp_path), seed=2)
    read_results(executor, device)
    tokens = await asyncio.wait_for(serve(executor, requests), 60)
    assert tokens == [expected("llama", request) for request in requests]
    assert not device.found


class LoadsAhead(CUDAExecutor):
    """Adapters are brought on the stream of uploads, while steps may read what they take the place of."""

    def _launch(self, forward_input: ForwardInput, side: Side, handle: CudaHandle) -> None:
        assert self._adapters is not None
        with self.layer.on(self._upload):
            self._adapters.load(forward_input, handle)
        forward_input.adapter_loads = []
        super()._launch(forward_input, side, handle)


class SharedRows(CUDAExecutor):
    """Both parities note whose their rows are in one place."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        assert self._adapters is not None
        self._adapters._sides[1] = self._adapters._sides[0]


@pytest.mark.parametrize("kind", [LoadsAhead, SharedRows])
async def test_a_mistake_of_order_is_found(kind: type[CUDAExecutor], tmp_path: Path) -> None:
    device = OrderedDevice(1)
    executor = make_executor(SMALL, device=device, model=a_model("llama"), kind=kind)
    await asyncio.wait_for(serve(executor, asked(adapters_of("llama", executor, tmp_path), seed=2)), 60)
    assert device.found


def one(adapter: Adapter | None, seed: int = 3) -> Request:
    return dataclasses.replace(requests_of(seed, 1)[0], adapter=adapter)


async def test_a_step_without_adapters_runs_the_graph_of_a_model_without_places() -> None:
    """Rows of none cost nothing: operation by operation it is the same."""
    noted: list[list[int]] = []
    for adapters in (CAPACITY, 0):
        device = FakeDevice(3)
        executor = make_executor(SMALL, device=device, model=tiny_model(max_adapters=adapters))
        sizes = []
        for key in (GraphKey(4, executor.graphs.widths[0], 0, draw) for draw in ("plain", "filtered")):
            with device.on(executor._compute):
                sizes.append(len(device.capture(functools.partial(executor._decode, key)).operations))
        noted.append(sizes)
        before = dict(device.counts)
        await serve(executor, [one(None)])
        noted[-1].append(device.counts["upload"] - before["upload"])
    assert noted[0] == noted[1]


async def test_whose_rows_are_is_sent_when_it_changes(tmp_path: Path) -> None:
    """A steady step of rows with adapters is one upload, one replay and one download, as of rows without."""
    device = FakeDevice(0)
    executor = make_executor(SMALL, device=device, model=a_model("llama"))
    (adapter,) = adapters_of("llama", executor, tmp_path, count=1)
    driver = Driver(executor)
    first = [prefill(1, [5, 6, 7])]
    await driver.wait(driver.launch(first, {1: [1, 2, 3, 4]}, {1: GREEDY}, adapters=[adapter.weights]))
    for position in range(3, 7):
        await driver.run([decode(1, position)])
    before = dict(device.counts)
    for position in range(7, 13):
        await driver.run([decode(1, position)])
    spent = {name: count - before[name] for name, count in device.counts.items()}
    assert spent == {"upload": 6, "download": 6, "replay": 6, "launch": 0, "capture": 0}
    executor.close()


@pytest.mark.parametrize("level", [1, 2])
async def test_adapters_are_there_after_a_sleep_and_new_weights(level: int, tmp_path: Path) -> None:
    def load(directory: Path | None) -> CausalLM:
        return tiny_model.__wrapped__(max_adapters=CAPACITY)

    device = FakeDevice(1)
    executor = make_executor(SMALL, device=device, model=load(None), load=load)
    executor.close = lambda: None  # type: ignore[method-assign]
    (adapter,) = adapters_of("llama", executor, tmp_path, count=1)
    first = [dataclasses.replace(one(each), request_id=f"r{n}") for n, each in enumerate((adapter, None))]
    wanted = [expected("llama", request) for request in first]
    assert await serve(executor, first) == wanted
    executor.sleep(level)
    assert executor._adapters is not None and not executor._adapters.shelf.memory.untyped_storage().nbytes()
    with pytest.raises(AdapterError, match="sleeps"):
        executor.read_adapter(tmp_path / "a1")
    executor.wake_up()
    # The engine would load it anew; what this one holds is what matters.
    executor._adapters.load = lambda step, handle: type(executor._adapters).load(  # type: ignore[method-assign]
        executor._adapters, dataclasses.replace(step, adapter_loads=[]), handle
    )
    assert await serve(executor, first) == wanted
    executor.load_weights(tiny_directory())
    assert await serve(executor, first) == wanted


async def test_no_weights_go_while_an_adapter_is_made_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = make_executor(SMALL, device=FakeDevice(1), model=a_model("llama"))
    adapters_of("llama", executor, tmp_path, count=1)
    reading, go = threading.Event(), threading.Event()
    read, found = cuda_adapters.read_adapter, []

    def slow(*given: Any) -> Any:
        reading.set()
        go.wait()
        found.append(all(linear._weight.untyped_storage().nbytes() for linear in executor.model.linears))
        return read(*given)

    monkeypatch.setattr(cuda_adapters, "read_adapter", slow)
    at_work = asyncio.create_task(asyncio.to_thread(executor.read_adapter, tmp_path / "a1"))
    await asyncio.to_thread(reading.wait)
    sleeping = asyncio.create_task(asyncio.to_thread(executor.sleep, 1))
    done, _ = await asyncio.wait([sleeping], timeout=0.1)
    go.set()
    await asyncio.gather(at_work, sleeping)
    assert not done and found == [True]
    executor.wake_up()
    executor.close()


async def test_an_upload_that_fails_is_made_up_for(tmp_path: Path) -> None:
    """The step fails; the next one brings the adapter, for the scheduler counts on it."""
    device = FakeDevice(1)
    executor = make_executor(SMALL, device=device, model=a_model("llama"))
    (adapter,) = adapters_of("llama", executor, tmp_path, count=1)
    assert executor._adapters is not None
    upload, failed = executor._adapters._upload, []

    def once(index: int, weights: Any) -> None:
        if not failed:
            failed.append(index)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        upload(index, weights)

    executor._adapters._upload = once  # type: ignore[method-assign]
    driver = Driver(executor)
    prompt = one(adapter).prompt_token_ids[:12]
    with pytest.raises(ForwardError, match="out of device memory"):
        first = driver.launch([prefill(1, prompt)], {1: [1, 2, 3, 4]}, {1: GREEDY}, adapters=[adapter.weights])
        await driver.wait(first)
    token = await driver.run([prefill(1, prompt)])
    assert token == [reference_next(merged("llama", 1), prompt, GREEDY)]
    executor.close()


REFUSED: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, Any]]] = {
    "a whole matrix in a layer of the decoder": ({"model.layers.0.self_attn.q_proj.weight": (32, 32)}, {}),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_gpu_does_not_compute_is_refused(what: str, tmp_path: Path) -> None:
    """In a line that names the tensor and the way out."""
    executor = make_executor(SMALL, model=a_model("llama"))
    shapes, config = REFUSED[what]
    tensors = {
        f"base_model.model.model.layers.0.self_attn.o_proj.lora_{end}.weight": torch.ones(shape)
        for end, shape in (("A", (4, 32)), ("B", (32, 4)))
    }
    tensors |= {f"base_model.model.{name}": torch.ones(shape) for name, shape in shapes.items()}
    with pytest.raises(AdapterError, match=r"is computed on the CPU alone so far \(--device cpu\)$") as error:
        executor.read_adapter(write(tmp_path / "a", tensors, **config))
    assert what in str(error.value) and "\n" not in str(error.value)
    executor.close()


def test_ranks_beyond_the_limit_are_refused(tmp_path: Path) -> None:
    executor = make_executor(SMALL, model=a_model("llama"))
    layers = a_model("llama").adapted
    assert isinstance(layers, AdaptedLayers)
    path = write(tmp_path / "a", factors(layers, 9, 1, in_layers(layers)), r=9)
    with pytest.raises(AdapterError, match="greater than max_lora_rank 8"):
        executor.read_adapter(path)
    without = make_executor(SMALL)
    with pytest.raises(AdapterError, match="without places"):
        without.read_adapter(path)
    executor.close()
    without.close()


def test_outputs_that_lie_among_anothers_have_one_part() -> None:
    """Otherwise every projection of the checkpoint has its own, wherever the layer puts it."""
    layers = a_model("llama").adapted
    assert isinstance(layers, AdaptedLayers)
    shapes = site_shapes(layers, 8)
    assert shapes["model.layers.0.self_attn.q_proj"] == SiteShape(32, 64, ((0, 32), (32, 48), (48, 64)), 8)
    assert shapes["model.layers.1.mlp.gate_proj"] == SiteShape(32, 96, ((0, 48), (48, 96)), 8)
    linear = layers.places["model.layers.0.mlp.gate_proj"].linear
    halves = [Place("x", linear, first, 48, torch.arange(96).roll(48)) for first in (0, 48)]
    assert _shape(halves, 8).parts == ((0, 48), (48, 96))
    mixed = [Place("x", linear, first, 48, torch.arange(96).view(2, 48).T.flatten()) for first in (0, 48)]
    assert _shape(mixed, 8) == SiteShape(32, 96, ((0, 96),), 16)


def test_start_makes_room_and_says_so() -> None:
    rows: dict[str, str] = {}
    options: dict[str, Any] = {
        "dtype": torch.float32,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 48,
        "max_model_len": 64,
        "row": rows.__setitem__,
        "max_lora_rank": 8,
    }
    model = tiny_model.__wrapped__(max_adapters=CAPACITY)
    executor = build_cuda_executor(
        model, FakeDevice(), CacheOptions(page_size=4, num_pages=30), cuda_graph="start", **options
    )
    assert executor.limits.max_adapters == CAPACITY
    assert rows["adapters"] == "2 in one step, of rank 8 and below, 0.00 GiB each"
    assert rows["CUDA graphs"].startswith(f"{4 * len(executor.graphs.sizes)} captured")
    executor.close()

    model = tiny_model.__wrapped__(max_adapters=CAPACITY)
    executor = build_cuda_executor(
        model, FakeDevice(), CacheOptions(page_size=4, num_pages=30), cuda_graph="off", max_lora_mib=11, **options
    )
    assert rows["adapters"] == "2 in one step, of rank 8 and below, 0.01 GiB each"
    executor.close()

    def full(shape: Any, dtype: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore of it.")

    device = FakeDevice()
    device.zeros = full  # type: ignore[method-assign]
    with pytest.raises(StartupError, match=r"^no memory is left for adapters: CUDA out of memory.*lower --max-loras"):
        build_cuda_executor(tiny_model.__wrapped__(max_adapters=2), device, CacheOptions(page_size=4), **options)

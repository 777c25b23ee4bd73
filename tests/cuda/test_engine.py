"""CUDAExecutor under the real scheduler and engine loop, on the fake device."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import EngineConfig, StartupError
from engine.engine import Engine
from engine.forward import ForwardInput
from engine.groups import one_group, plan_groups
from engine.models.parts.decoder import CausalLM
from tests.cuda.fake_device import FakeDevice
from tests.cuda.support import (
    BESIDE,
    CHUNKED,
    GROUPED,
    HYBRID,
    LATENT,
    SMALL,
    WINDOWED,
    expected_tokens,
    make_executor,
    requests_of,
    serve,
    tiny_model,
)
from tests.sim.workload import Runs

EAGERNESS = [0.0, 0.3, 0.9]


@pytest.mark.parametrize("attention", ["torch", "xqa", "wrapper"])
@pytest.mark.parametrize("seed", range(3))
async def test_tokens_are_the_references(attention: str, seed: int) -> None:
    requests = requests_of(seed)
    device = FakeDevice(seed, EAGERNESS[seed])
    tokens = await serve(make_executor(SMALL, device=device, attention=attention), requests)
    assert tokens == [expected_tokens(tiny_model(), request) for request in requests]
    assert device.counts["replay"] > 0


@pytest.mark.parametrize("config", [LATENT, CHUNKED], ids=["latent", "chunks"])
async def test_attention_that_only_torch_has(config: dict[str, Any]) -> None:
    model = tiny_model(json.dumps(config))
    limits = dataclasses.replace(SMALL, groups=one_group(model.config.windows))
    requests = requests_of(9)
    tokens = await serve(make_executor(limits, device=FakeDevice(9, 0.3), model=model), requests)
    assert tokens == [expected_tokens(model, request) for request in requests]


@pytest.mark.parametrize(
    ("heads", "seed", "mode"),
    [(4, 0, "lazy"), (4, 1, "start"), (4, 2, "off"), (4, 2, "lazy"), (6, 1, "lazy"), (6, 0, "start")],
)
async def test_latents_by_flashinfer(heads: int, seed: int, mode: str) -> None:
    """In graphs and beside prompts, which share a plan with them where their heads fill a tile."""
    config = {**LATENT, "num_attention_heads": heads, "num_key_value_heads": heads}
    model = tiny_model(json.dumps(config))
    requests = requests_of(seed + 20)
    device = FakeDevice(seed, EAGERNESS[seed])
    executor = make_executor(SMALL, device=device, model=model, attention="latent", cuda_graph=mode)
    assert executor.attention.describe() == "FlashInfer MLA, fa3" + (
        "" if heads == 4 else ", prompts by torch (slow), as 6 heads do not divide 128"
    )
    if mode == "start":
        executor.capture_at_start()
    assert await serve(executor, requests) == [expected_tokens(model, request) for request in requests]
    assert (device.counts["replay"] > 0) == (mode != "off")


@pytest.mark.parametrize("config", [HYBRID, BESIDE], ids=["delta", "mamba"])
@pytest.mark.parametrize("mode", ["lazy", "start", "off"])
async def test_recurrent_states(config: dict[str, Any], mode: str) -> None:
    """In graphs and beside prompts; retraction, and prefixes that go on from snapshots, of which there are few."""
    model = tiny_model(json.dumps(config))
    limits = dataclasses.replace(SMALL, num_snapshots=3)
    requests = requests_of(12, 12)
    device = FakeDevice(12, 0.3)
    executor = make_executor(limits, device=device, model=model, cuda_graph=mode)
    states, saved, loaded = executor._states, [], []
    assert states is not None
    move = states.move

    def noting(step: ForwardInput) -> None:
        saved.append(step.num_saves)
        loaded.append(step.num_loads)
        move(step)

    states.move = noting  # type: ignore[method-assign]
    if mode == "start":
        executor.capture_at_start()
    tokens = await serve(executor, requests)
    assert tokens == [expected_tokens(model, request) for request in requests]
    assert sum(saved) and sum(loaded) and not len(executor.pieces)
    assert (device.counts["replay"] > 0) == (mode != "off")


async def test_states_come_back_after_sleep() -> None:
    model = tiny_model(json.dumps(HYBRID))
    limits = dataclasses.replace(SMALL, num_snapshots=3)
    executor = make_executor(limits, device=FakeDevice(3), model=model)
    states = executor._states
    assert states is not None
    held = executor.held_bytes()
    assert held["weights"] > 0 and held["recurrent states"] == states._memory.nbytes > 0 and executor.page_bytes > 0
    executor.sleep(1)
    assert not states._memory.numel()
    assert executor.held_bytes()["weights"] == executor.held_bytes()["recurrent states"] == executor.page_bytes == 0
    executor.wake_up()
    assert executor.held_bytes() == held
    requests = requests_of(3)
    assert await serve(executor, requests) == [expected_tokens(model, request) for request in requests]


@pytest.mark.parametrize("attention", ["torch", "xqa", "wrapper"])
async def test_pages_that_left_every_window_are_given_back(attention: str) -> None:
    """A pool of 24 tokens for texts of up to 41: null pages stand in the tables, and other rows' KV behind them."""
    model = tiny_model(json.dumps({**WINDOWED, "max_window_layers": 0}))
    assert model.config.longest_window == 6
    limits = dataclasses.replace(SMALL, num_pages=6, groups=one_group(model.config.windows))
    requests = requests_of(8)
    assert max(len(request.prompt_token_ids) + (request.sampling.max_tokens or 0) for request in requests) > 24
    tokens = await serve(make_executor(limits, device=FakeDevice(8), attention=attention, model=model), requests)
    assert tokens == [expected_tokens(model, request) for request in requests]


@pytest.mark.parametrize("attention", ["torch", "xqa", "wrapper"])
@pytest.mark.parametrize("mode", ["lazy", "start", "off"])
async def test_every_memory_group_has_its_own_pages(attention: str, mode: str) -> None:
    """Layers of different groups share buffers and no page; the windowed ones give theirs back."""
    model = tiny_model(json.dumps(GROUPED))
    groups = plan_groups(model.config.windows, SMALL.max_model_len)
    assert [group.window for group in groups] == [None, 6, 6, 6]
    # Of 16 pages that a text of 64 tokens has in each group; four such texts run at once.
    limits = dataclasses.replace(SMALL, num_pages=44, groups=groups)
    requests = requests_of(11)
    executor = make_executor(limits, device=FakeDevice(11, 0.3), attention=attention, model=model, cuda_graph=mode)
    assert executor.attention.k_pools[0].data_ptr() == executor.attention.k_pools[3].data_ptr()
    if mode == "start":
        executor.capture_at_start()
    tokens = await serve(executor, requests)
    assert tokens == [expected_tokens(model, request) for request in requests]


@pytest.mark.parametrize("seed", range(3, 6))
async def test_overlap_changes_no_token(seed: int) -> None:
    requests = requests_of(seed)
    outputs = [
        await serve(make_executor(SMALL, device=FakeDevice(seed, EAGERNESS[seed % 3])), requests, overlap=overlap)
        for overlap in (True, False)
    ]
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("attention", ["torch", "xqa", "wrapper"])
async def test_forced_tokens_beside_drawn_ones(attention: str) -> None:
    """Every other request has forced runs, which come as chunks between its decodes."""
    requests = [
        dataclasses.replace(
            request,
            sampling=dataclasses.replace(request.sampling, max_tokens=14),
            constraint=Runs(number, SMALL.vocab_size, free=number % 3, run=4, length=99) if number % 2 else None,
        )
        for number, request in enumerate(requests_of(8))
    ]
    device = FakeDevice(8, EAGERNESS[1])
    tokens = await serve(make_executor(SMALL, device=device, attention=attention), requests)
    assert tokens == [expected_tokens(tiny_model(), request) for request in requests]


@pytest.mark.parametrize("mode", ["start", "off"])
async def test_padded_graphs_change_no_token(mode: str) -> None:
    """Every step replayed from a graph, padding and all, or none."""
    requests = requests_of(6)
    device = FakeDevice(6)
    executor = make_executor(SMALL, device=device, cuda_graph=mode)
    if mode == "start":
        executor.capture_at_start()
        assert len(executor.graphs) == 2 * len(executor.graphs.sizes) and len(executor.pieces)
        assert len(executor.graphs) + len(executor.pieces) == device.counts["capture"]
    tokens = await serve(executor, requests)
    assert tokens == [expected_tokens(tiny_model(), request) for request in requests]
    assert (device.counts["replay"] > 0) == (mode == "start")


async def test_stages_are_named_when_asked() -> None:
    device = FakeDevice(0)
    executor = make_executor(SMALL, device=device)
    engine = Engine(EngineConfig(), executor, None)
    engine.name_stages(device.range)
    device.ranges.clear()
    loop_task = asyncio.create_task(engine.run())
    async with engine.submit(requests_of(0, 1)[0]) as stream:
        await stream.collect()
    loop_task.cancel()
    await asyncio.gather(loop_task, return_exceptions=True)
    executor.close()
    assert device.ranges[:3] == ["schedule", "launch", "schedule"] and "commit" in device.ranges


async def test_a_step_without_memory_is_tried_again() -> None:
    requests = requests_of(7)
    device = FakeDevice(7)
    executor = make_executor(SMALL, device=device)
    executor.pieces.sizes.clear()  # the second launch is the step's own, not one of a capture that may fail
    launch, failed = executor._launch_mixed, []

    def failing(*args: object) -> object:
        if args[0].step == 3:  # type: ignore[attr-defined]
            failed.append(3)
            device.launches_until_failure = 2
        return launch(*args)  # type: ignore[arg-type]

    executor._launch_mixed = failing  # type: ignore[method-assign]
    tokens = await serve(executor, requests)
    assert failed and tokens == [expected_tokens(tiny_model(), request) for request in requests]


async def test_weights_that_find_no_memory_leave_the_old_ones_serving() -> None:
    requests, model = requests_of(0), tiny_model()
    executor = make_executor(SMALL, device=FakeDevice(0))
    held: list[weakref.ref[torch.Tensor]] = []

    def load(directory: Path | None) -> CausalLM:
        half = torch.zeros(4)
        held.append(weakref.ref(half))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    executor._load = load
    allocate = executor.attention.allocate

    def allocate_behind_it() -> None:
        assert held[0]() is None, "the half loaded model is still there"
        allocate()

    executor.attention.allocate = allocate_behind_it  # type: ignore[method-assign]
    with pytest.raises(StartupError, match=r"^no device memory for two models: CUDA out of memory\.$"):
        executor.load_weights(Path("anywhere"))
    assert await serve(executor, requests) == [expected_tokens(model, request) for request in requests]

"""The tier in host memory under the real engine, on the fake device: what comes back is what was computed, whenever the
device gets round to copying it, and nothing that steps do is in no order with the copies."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from engine.config import EngineConfig, SpeculationOptions, StartupError, TierOptions
from engine.engine import Engine
from engine.executor.base import DeviceMemory
from engine.executor.cuda import CUDAExecutor
from engine.executor.cuda_drafter import DeviceDrafter
from engine.executor.cuda_pages import DevicePages
from engine.groups import plan_groups
from engine.request import Request, SamplingParams
from engine.tiers.worker import Job, Worker
from tests.cuda.fake_device import FakeDevice
from tests.cuda.ordered_device import OrderedDevice
from tests.cuda.support import GROUPED, HYBRID, NO_DRAFTS, SMALL, expected_tokens, make_executor, tiny_model
from tests.cuda.test_draft_models import MODEL, itself, make, with_net
from tests.tiers.test_events import subscribe

# Of pages, in host memory.
ROOM = 120
LIMITS = dataclasses.replace(SMALL, num_pages=28)


def prompts(seed: int, count: int) -> list[list[int]]:
    """Three texts in turn, each with an end of its own: the device holds one or two of them."""
    random = Random(seed)
    texts = [[random.randrange(3, 100) for _ in range(36)] for _ in range(3)]
    return [texts[number % 3] + [random.randrange(3, 100) for _ in range(4)] for number in range(count)]


def ask(number: int, prompt: list[int], max_tokens: int = 5) -> Request:
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return Request(f"r{number}", prompt, sampling, stream=False)


@asynccontextmanager
async def running(
    executor: CUDAExecutor,
    *,
    room: int = ROOM,
    directory: Path | None = None,
    check_invariants: bool = True,
    speculation: SpeculationOptions = NO_DRAFTS,
) -> AsyncIterator[Engine]:
    memory, states = executor.page_memory(), executor.state_memory()
    size = memory.page_bytes
    if states is not None:
        size += states.page_bytes * (executor.limits.num_snapshots or 0) // executor.limits.num_pages + 1
    tiers = TierOptions(directory, 10**8, 60.0, room * size)
    config = EngineConfig(tiers=tiers, check_invariants=check_invariants, speculation=speculation)
    engine = Engine(config, executor, None)
    engine.enable_tier(lambda other: "weights")._least_tokens = 4
    task = asyncio.create_task(engine.run())
    try:
        yield engine
        await settled(engine)
        assert not engine.lending.lent
    finally:
        task.cancel()
        await asyncio.wait({task})
        executor.close()


async def settled(engine: Engine) -> None:
    assert engine.tier is not None
    for _ in range(2000):
        if not engine.tier._jobs and not engine.tier.worker._spills and engine.scheduler.is_empty:
            return
        await asyncio.sleep(0.005)
    raise AssertionError("the tier does not settle")


async def answers(engine: Engine, requests: list[Request], at_once: int = 2) -> list[list[int]]:
    """Of some at a time."""

    async def one(request: Request) -> list[int]:
        async with engine.submit(request) as stream:
            return (await stream.collect()).token_ids

    found: list[list[int]] = []
    for first in range(0, len(requests), at_once):
        found += await asyncio.gather(*map(one, requests[first : first + at_once]))
        await settled(engine)
    return found


def executor_of(kind: str, device: FakeDevice, **options: Any) -> CUDAExecutor:
    if kind == "states":
        limits = dataclasses.replace(LIMITS, num_snapshots=3)
        return make_executor(limits, device=device, model=tiny_model(json.dumps(HYBRID)), **options)
    if kind == "windows":
        model = tiny_model(json.dumps(GROUPED))
        limits = dataclasses.replace(
            LIMITS, num_pages=60, groups=plan_groups(model.config.windows, LIMITS.max_model_len)
        )
        return make_executor(limits, device=device, model=model, **options)
    return make_executor(LIMITS, device=device, **options)


@pytest.mark.parametrize("kind", ["full", "states", "windows"])
@pytest.mark.parametrize(("seed", "eagerness"), [(0, 0.0), (1, 0.3), (2, 0.9)])
async def test_what_left_the_device_comes_back(kind: str, seed: int, eagerness: float) -> None:
    executor = executor_of(kind, FakeDevice(seed, eagerness))
    requests = [ask(number, prompt) for number, prompt in enumerate(prompts(seed, 12))]
    async with running(executor) as engine:
        given = await answers(engine, requests[:6]) + await answers(engine, requests[6:], 1)
        assert given == [expected_tokens(executor.model, one) for one in requests]
        assert engine.tier is not None
        tier, text = engine.tier, engine.metrics.render().decode()
        # There is little room for pages that are lent at once, but those that are carried arrive: at least of each
        # text that comes again on its own.
        assert tier.tally.hit_tokens > 60 and not tier.tally.failures.keys() - {"room", "busy"}
        assert tier.worker.num_bytes_in and tier.worker.num_bytes_out
        assert f"oneloop_kv_host_hit_tokens_total {tier.tally.hit_tokens}.0" in text
        assert f"oneloop_kv_host_loaded_bytes_total {float(tier.worker.num_bytes_in)}" in text
        assert tier.worker.host is not None and tier.worker.host.num_rows
        assert f"oneloop_kv_host_pages {tier.worker.host.num_rows}.0" in text


@pytest.mark.parametrize(("attention", "kept"), [("torch", True), ("xqa", True), ("torch", False)])
async def test_what_drafts_goes_on_from_its_own_pages(
    attention: str, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model drafts for itself: it is always right where its keys and values came back, and only there."""
    if not kept:
        monkeypatch.setattr(DeviceDrafter, "pools", [])
    limits = dataclasses.replace(LIMITS, max_draft_tokens=4)
    executor = make(with_net(itself, attention), limits, device=FakeDevice(4, 0.3), attention=attention)
    requests = [ask(number, prompt, 9) for number, prompt in enumerate(prompts(4, 9))]
    async with running(executor, speculation=MODEL) as engine:
        given = await answers(engine, requests, 1)
        assert given == [expected_tokens(executor.model, one) for one in requests]
        assert engine.tier is not None and engine.tier.tally.hit_tokens > 60
        counts = executor.counts
        assert counts["drafted"] > 20 and (counts["accepted"] == counts["drafted"]) == kept


async def test_what_left_host_memory_comes_from_the_disk(tmp_path: Path) -> None:
    requests = [ask(number, prompt) for number, prompt in enumerate(prompts(5, 12))]
    for again in (False, True):
        executor = executor_of("full", FakeDevice(5))
        async with running(executor, room=14, directory=tmp_path) as engine:
            assert await answers(engine, requests, 1) == [expected_tokens(executor.model, one) for one in requests]
            assert engine.tier is not None
            worker = engine.tier.worker
            assert worker.host is not None and worker.host.num_evicted and worker.num_bytes_read
            # All of a restarted server's first prompts come from there.
            assert bool(worker.num_bytes_written) != again
            assert "oneloop_kv_disk_files" in engine.metrics.render().decode()


async def test_the_disk_alone(tmp_path: Path) -> None:
    requests = [ask(number, prompt) for number, prompt in enumerate(prompts(6, 6))]
    for again in (False, True):
        executor = executor_of("full", FakeDevice(6))
        async with running(executor, room=0, directory=tmp_path) as engine:
            assert await answers(engine, requests) == [expected_tokens(executor.model, one) for one in requests]
            assert engine.tier is not None and engine.tier.worker.host is None
            worker, tally = engine.tier.worker, engine.tier.tally
            assert worker.num_bytes_written > 0 if not again else (worker.num_bytes_read and tally.hit_tokens > 60)


def storages_of(*executors: CUDAExecutor) -> list[StorageWeakRef]:
    """Of their pages, which nobody else may hold on to while they sleep."""
    return [StorageWeakRef(each.untyped_storage()) for one in executors for each in one.attention.buffers]


async def test_host_memory_outlives_sleep() -> None:
    executor = executor_of("full", FakeDevice(7))
    request = ask(0, prompts(7, 1)[0])
    async with running(executor) as engine:
        first = await answers(engine, [request])
        held = storages_of(executor)
        await engine.sleep(1)
        assert held and all(each.expired() for each in held)
        await engine.wake_up()
        assert await answers(engine, [dataclasses.replace(request, request_id="again")]) == first
        assert engine.tier is not None and engine.tier.tally.hit_tokens == 36


# ---- the order of copies and steps


# Of a snapshot, while a step writes another to its place: what was read of one that is no longer there is not kept (see
# Worker). Nothing else of such models is written by that operation.
THROWN_AWAY = {
    "another reads (aten::index_select) while compute writes (aten::copy_)",
    "compute writes (aten::copy_) while another reads (aten::index_select)",
}


def listen(device: OrderedDevice, worker: Worker) -> None:
    """The tier's thread knows what the loop did before a job, and the loop what the thread did when it is told of its
    end; neither knows more of the other."""
    told: dict[Job, dict[str, int]] = {}
    turn = worker.turn

    def given(add: Callable[[Job], None], job: Job) -> None:
        told[job], then = device.known(), job.then

        def ended(job: Job) -> None:
            device.heard(told.pop(job))
            then(job)

        job.then = ended
        add(job)

    def begun(carry: Callable[[Job], int], job: Job) -> int:
        device.heard(told[job], apart=True)
        return carry(job)

    def turned() -> Job | None:
        if (job := turn()) is not None:
            told[job] = device.known()
        return job

    changed: dict[str, Any] = {
        "read": partial(given, worker.read),
        "write": partial(given, worker.write),
        "_read": partial(begun, worker._read),
        "_write": partial(begun, worker._write),
        "turn": turned,
    }
    for name, function in changed.items():
        setattr(worker, name, function)


async def findings(kind: str = "full", seed: int = 3, mutant: Callable[[Engine], None] | None = None) -> dict[str, int]:
    device = OrderedDevice(seed)
    executor = executor_of(kind, device)
    async with running(executor, check_invariants=mutant is None) as engine:
        assert engine.tier is not None
        listen(device, engine.tier.worker)
        if mutant is not None:
            mutant(engine)
        requests = [ask(number, prompt, 3 + number % 5) for number, prompt in enumerate(prompts(seed, 18))]
        await answers(engine, requests[:6], 1)
        await busily(engine, requests[6:])
        assert engine.tier.tally.hit_tokens
    return {each: count for each, count in device.found.items() if kind != "states" or each not in THROWN_AWAY}


async def busily(engine: Engine, requests: list[Request]) -> None:
    """Three at a time, so that pages come and go while others' steps are in flight."""
    left = iter(requests)

    async def client() -> None:
        for request in left:
            async with engine.submit(request) as stream:
                await stream.collect()

    await asyncio.gather(*[client() for _ in range(3)])


@pytest.mark.parametrize(("kind", "seed"), [("full", 3), ("states", 4), ("windows", 3), ("windows", 4)])
async def test_copies_are_ordered(kind: str, seed: int) -> None:
    assert not await findings(kind, seed)


def no_wait(engine: Engine) -> None:
    """Copies that nobody waits for."""
    copier = engine.executor._copier  # type: ignore[attr-defined]
    synchronize = copier.layer.synchronize
    copier.layer.synchronize = lambda event: event is copier.event or synchronize(event)


def no_patience(engine: Engine) -> None:
    """Pages are filled while steps may yet write to them as another's."""
    engine.lending.once_committed = lambda then: then()


@pytest.mark.parametrize(
    ("kind", "mutant"),
    [("full", no_wait), ("states", no_wait), ("windows", no_wait), ("windows", no_patience)],
)
async def test_copies_in_no_order_are_found(kind: str, mutant: Callable[[Engine], None]) -> None:
    # Which steps are under way while the tier's thread copies depends on when it has a processor.
    for seed in (3, 4, 3, 4, 3, 4):
        found = await findings(kind, seed, mutant)
        if any("another" in each and "compute" in each for each in found):
            return
    raise AssertionError(f"nothing was found in six runs but {found}")


# ---- the memory alone


def test_pages_there_and_back() -> None:
    device = FakeDevice(1, 0.2)
    executor = executor_of("full", device)
    memory = executor.page_memory()
    assert isinstance(memory, DeviceMemory) and memory.rows_at_once == 64
    memory.rows_at_once = 3
    with device.may_block():
        rows = memory.rows(8)
        rows[:] = np.random.default_rng(0).integers(0, 255, rows.shape)
        pages = np.array([5, 2, 9, 11, 7], np.int32)
        memory.copy_rows_in(pages, list(rows[:5]))
        back = memory.rows(5)
        memory.copy_rows_out(pages[::-1].copy(), list(back))
        assert (back == rows[:5][::-1]).all()
        data = np.zeros((2, memory.page_bytes), np.uint8)
        memory.copy_out(pages[1:3], data)
        assert (data == rows[1:3]).all()
        memory.copy_in(pages[1:3], data[::-1])
        memory.copy_out(pages[1:3], data)
        assert (data == rows[1:3][::-1]).all()
    # Each layer's keys and values are where attention looks for them.
    keys = executor.attention.k_pools[0][5].contiguous().view(torch.uint8).flatten().numpy()
    assert (rows[0, : len(keys)] == keys).all()
    executor.close()


def test_nobody_reads_pages_of_a_gpu_by_an_address() -> None:
    executor = executor_of("full", FakeDevice(1))
    with pytest.raises(StartupError, match="these pages are on a GPU; the TcpConnector carries them"):
        executor.page_memory().regions()
    executor.close()


def test_layouts_tell_models_apart() -> None:
    layouts = set()
    for kind in ("full", "windows"):
        executor = executor_of(kind, FakeDevice(1))
        memory = executor.page_memory()
        assert isinstance(memory, DevicePages)
        layouts.add(memory.layout)
        executor.close()
    assert len(layouts) == 2


async def test_what_is_in_host_memory_is_told_of() -> None:
    """By vLLM's name for it; and what leaves it."""
    executor = executor_of("full", FakeDevice(7))
    async with running(executor, room=14) as engine:
        subscriber = subscribe(engine)
        told = []
        for prompt in prompts(7, 9):
            await answers(engine, [ask(len(told), prompt)], 1)
            assert engine.tier is not None and engine.tier.worker.host is not None
            told.append(set(subscriber.held["CPU"]))
            assert len(told[-1]) == engine.tier.worker.host.num_rows
        assert engine.tier.worker.host.num_evicted and not set.intersection(*told[3:]) and told[0]
        assert told[0] <= subscriber.tokens.keys(), "hashes are those of the device's pages"

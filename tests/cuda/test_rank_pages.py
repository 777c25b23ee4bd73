"""Pages of a KV memory that is divided over ranks, to host memory and to other servers, and back."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import numpy as np
import pytest
import torch

from engine.config import EngineConfig, SchedulerOptions, StartupError
from engine.distributed.pages import CarryingRank
from engine.engine import Engine
from engine.forward import DeviceLostError
from engine.request import Request, SamplingParams
from tests.cuda import test_host_tier, test_transfer
from tests.cuda.fake_device import FakeDeviceError
from tests.cuda.ranked import Machine, machine
from tests.cuda.support import GROUPED, HYBRID, TINY, expected_tokens, requests_of, serve, tiny_model
from tests.cuda.test_host_tier import answers, ask, prompts
from tests.cuda.test_ranks import poisoned
from tests.transfer.test_models import exchange_of, prefilled, request_of

GREEDY = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
CONFIGS = {"full": TINY, "states": HYBRID, "windows": GROUPED}


def divided(kind: str, size: int = 2, **options: Any) -> Any:
    given: dict[str, Any] = {"config": CONFIGS[kind], "num_pages": 60 if kind == "windows" else 28}
    return machine(size, **(given | options))


def parts_of(made: Machine, page: int) -> list[bytes]:
    """What each rank has of a page."""
    found = []
    for executor in made.executors:
        buffers = [each for each in executor.attention.buffers if each.shape[-1]]
        found.append(b"".join(each[page].contiguous().view(torch.uint8).numpy().tobytes() for each in buffers))
    return found


def copied(made: Machine) -> None:
    """There and back, on a thread that is not the loop's."""
    memory = made.leader.page_memory()
    assert made.leader.state_memory() is None
    pages, others = np.array([3, 5, 1], np.int32), np.array([7, 9, 8, 2, 6], np.int32)
    out = np.zeros((3, memory.page_bytes), np.uint8)
    memory.copy_out(pages, out)
    assert [row.tobytes() for row in out] == [b"".join(parts_of(made, page)) for page in pages]
    assert len({row.tobytes() for row in out}) == 3
    rows = memory.rows(5)
    rows[:] = np.random.default_rng(1).integers(0, 256, rows.shape, np.uint8)
    memory.rows_at_once = 2
    memory.copy_rows_in(others, list(rows))
    assert [b"".join(parts_of(made, page)) for page in others] == [row.tobytes() for row in rows]
    again = memory.rows(5)
    memory.copy_rows_out(others, list(again))
    assert np.array_equal(again, rows)
    memory.copy_in(others[:3], out)
    assert [b"".join(parts_of(made, page)) for page in others[:3]] == [row.tobytes() for row in out]
    with pytest.raises(StartupError, match="its peers read host memory"):
        memory.regions()


async def test_bytes_of_all_ranks() -> None:
    with divided("full", 4, seed=2) as made:
        close, made.leader.close = made.leader.close, lambda: None
        await serve(made.leader, requests_of(2))
        made.leader.close = close
        await asyncio.to_thread(copied, made)


@pytest.mark.parametrize("kind", CONFIGS)
async def test_what_left_the_devices_comes_back(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.executor.start.MOST_SNAPSHOTS", 3)
    requests = [ask(number, prompt) for number, prompt in enumerate(prompts(1, 7))]
    with divided(kind, seed=1) as made:
        async with test_host_tier.running(made.leader) as engine:
            given = await answers(engine, requests[:4]) + await answers(engine, requests[4:], 1)
            model = tiny_model(json.dumps(CONFIGS[kind]))
            assert given == [expected_tokens(model, one) for one in requests]
            assert engine.tier is not None and engine.tier.tally.hit_tokens > 0
            assert not engine.tier.tally.failures.keys() - {"room", "busy"}
            if kind == "full":
                held = test_host_tier.storages_of(*made.executors)
                await engine.sleep(1)
                assert held and all(each.expired() for each in held)
                await engine.wake_up()
                assert await answers(engine, requests[:1], 1) == given[:1]


async def test_from_one_group_of_ranks_to_another() -> None:
    [prompt] = prompts(3, 1)
    with divided("full", seed=3) as one, divided("full", seed=4) as other:
        async with test_transfer.running(one.leader) as prefill, test_transfer.running(other.leader) as decode:
            request = request_of(ask(0, prompt), await prefilled(prefill, prompt))
            async with decode.submit(request) as stream:
                assert (await stream.collect()).token_ids == expected_tokens(tiny_model(), request)
            tally = exchange_of(decode).tally
            assert tally.hit_tokens > 20 and not tally.failures and not tally.recomputed_tokens


async def test_what_is_no_number_goes_before_anything_is_copied_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 is through with a step that brought no numbers, and none follows: its pages are somebody else's."""
    with machine(2, load=poisoned, num_pages=28, seed=5) as made:
        engine = Engine(EngineConfig(scheduler=SchedulerOptions(overlap=False)), made.leader, None)
        task = asyncio.create_task(engine.run())
        memory, order = made.leader.page_memory(), []
        cleanse, obey = made.executors[1]._cleanse, CarryingRank._obey
        made.executors[1]._cleanse = lambda *given: (order.append("cleanse"), cleanse(*given))
        monkeypatch.setattr(
            CarryingRank, "_obey", lambda *a, **words: (order.append(words["do"]), obey(*a, **words))[1]
        )
        async with engine.submit(Request("broken", [7] * 10, GREEDY)) as stream:
            assert (await stream.collect()).error is not None
        await asyncio.to_thread(memory.copy_in, np.array([1], np.int32), np.ones((1, memory.page_bytes), np.uint8))
        assert order == ["cleanse", "in"]
        async with engine.submit(Request("sound", [5, 9], GREEDY)) as stream:
            assert (await stream.collect()).error is None
        assert order == ["cleanse", "in"]
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_rank_that_cannot_copy_ends_the_group() -> None:
    made = Machine(2, num_pages=28)
    try:
        memory = made.leader.page_memory()
        made.devices[1].error = RuntimeError("an illegal address")
        into = np.zeros((1, memory.page_bytes), np.uint8)
        with pytest.raises(DeviceLostError, match=r"rank 1.*an illegal address"):
            await asyncio.to_thread(memory.copy_out, np.array([1], np.int32), into)
    finally:
        made.leader.close()


@pytest.mark.parametrize("where", [0, 1])
async def test_a_rank_without_memory_for_a_copy_is_asked_again(where: int) -> None:
    """What the others have said of the copy that failed is no answer to the next one."""
    with divided("full", seed=2) as made:
        close, made.leader.close = made.leader.close, lambda: None
        await serve(made.leader, requests_of(2))
        made.leader.close = close
        device, launch = made.devices[where], made.devices[where].launch

        def refuse(work: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

        def copy(memory: Any) -> None:
            into = np.zeros((1, memory.page_bytes), np.uint8)
            device.launch = refuse  # type: ignore[method-assign]
            with pytest.raises(StartupError, match="no device memory to copy pages: CUDA out of memory"):
                memory.copy_out(np.array([2], np.int32), into)
            device.launch = launch  # type: ignore[method-assign]
            for page in (3, 5, 1):
                memory.copy_out(np.array([page], np.int32), into)
                assert into[0].tobytes() == b"".join(parts_of(made, page))

        def work() -> None:
            zeros = device.zeros
            device.zeros = lambda *given: refuse(given)  # type: ignore[assignment,method-assign,return-value]
            with pytest.raises(StartupError, match="no device memory to copy pages"):
                made.leader.page_memory()
            device.zeros = zeros  # type: ignore[method-assign]
            copy(made.leader.page_memory())

        await asyncio.wait_for(asyncio.to_thread(work), 300)


async def test_whatever_else_fails_in_rank_0_ends_the_group() -> None:
    made = Machine(2, num_pages=28)
    try:
        memory = made.leader.page_memory()
        made.devices[0].error = RuntimeError("an illegal address")
        into = np.zeros((1, memory.page_bytes), np.uint8)
        with pytest.raises(FakeDeviceError, match="an illegal address"):
            await asyncio.to_thread(memory.copy_out, np.array([1], np.int32), into)
        made.threads[0].join(300)
        assert not made.threads[0].is_alive() and not made.errors
        assert made.leader._group.why().startswith("rank 0 failed as pages were copied: FakeDeviceError: ")
    finally:
        made.leader.close()

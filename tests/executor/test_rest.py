"""The contract of Executor at rest: sleep, wake_up and load_weights, the same for every implementation."""

from __future__ import annotations

import asyncio
import gc
import weakref
from pathlib import Path

import pytest

from engine.config import StartupError
from engine.executor.fake import FakeExecutor
from engine.forward import PARTS
from tests.executor.driver import GREEDY, Driver, ExecutorAdapter, continuation, decode, prefill

A = [5, 6, 7, 8, 9, 10, 11]
PAGES = {1: [3, 4, 5]}


async def say(driver: Driver, count: int = 3) -> list[int]:
    """A prompt from its first token, and what follows; decode steps often enough for graphs to be captured."""
    tokens = await driver.run([prefill(1, A)], PAGES, {1: GREEDY})
    for step in range(count - 1):
        tokens += await driver.run([decode(1, len(A) + step)])
    return tokens


async def test_tokens_are_the_same_after_a_sleep(adapter: ExecutorAdapter, driver: Driver) -> None:
    expected = continuation(adapter, A, 5)
    assert await say(driver, 5) == expected
    for level in (1, 2, 1):
        # On another thread, as the engine does it.
        await asyncio.to_thread(driver.executor.sleep, level)
        await asyncio.to_thread(driver.executor.wake_up)
        assert await say(driver, 5) == expected


async def test_weights_are_read_from_where_they_are_told(adapter: ExecutorAdapter, driver: Driver) -> None:
    driver.executor.sleep(2)
    with pytest.raises(StartupError):
        driver.executor.wake_up(Path("/no/such/directory"))
    driver.executor.wake_up(adapter.checkpoint())
    assert await say(driver) == continuation(adapter, A, 3)


async def test_loaded_weights_serve_and_a_failure_leaves_the_old_ones(adapter: ExecutorAdapter, driver: Driver) -> None:
    expected = continuation(adapter, A, 3)
    assert await say(driver) == expected
    with pytest.raises(StartupError):
        await asyncio.to_thread(driver.executor.load_weights, Path("/no/such/directory"))
    assert await say(driver) == expected
    await asyncio.to_thread(driver.executor.load_weights, adapter.checkpoint())
    assert await say(driver) == expected


async def test_memory_is_given_back(adapter: ExecutorAdapter, driver: Driver) -> None:
    """Of those that have any: no pool, and after level 2 no model, is left to hold it."""
    await say(driver)
    executor = driver.executor
    if isinstance(executor, FakeExecutor) or getattr(adapter, "attention", "torch") != "torch":
        pytest.skip("a stand-in of the tests holds what it is shown")
    for level in (1, 2):
        attention = getattr(executor, "attention", None) or executor._attention  # type: ignore[attr-defined]
        held = attention.k_pools, attention.v_pools
        pools = [weakref.ref(pool) for each in held for pool in (each.values() if isinstance(each, dict) else each)]
        del attention, held
        assert pools
        executor.sleep(level)
        gc.collect()
        assert all(pool() is None for pool in pools)
        assert (level == 2) == (getattr(executor, "model", getattr(executor, "_model", None)) is None)
        executor.wake_up()
    assert await say(driver) == continuation(adapter, A, 3)


async def test_parts_sleep_and_wake_up_by_themselves(adapter: ExecutorAdapter, driver: Driver) -> None:
    executor, expected = driver.executor, continuation(adapter, A, 3)
    assert await say(driver) == expected
    for level in (1, 2):
        for slept, first, last in ((PARTS, *PARTS), (PARTS, *reversed(PARTS)), (PARTS[1:], *reversed(PARTS))):
            await asyncio.to_thread(executor.sleep, level, slept)
            await asyncio.to_thread(executor.wake_up, None, [first])
            if first == "weights":
                # What a trainer sends comes while there is no KV memory yet.
                await asyncio.to_thread(executor.load_weights, adapter.checkpoint())
            if last in slept:
                await asyncio.to_thread(executor.wake_up, None, [last])
            assert await say(driver) == expected

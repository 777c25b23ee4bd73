"""Steps with prompts as chains of graphs: what they cost, that they change no token, and what becomes of failures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from engine.executor.cuda_device import CaptureError, CapturesOver
from engine.executor.cuda_pieces import SIZES
from tests.cuda.fake_device import FakeDevice
from tests.cuda.support import SMALL, TINY, CudaAdapter, make_executor
from tests.executor.driver import GREEDY, Driver, continuation, decode, prefill

PROMPTS = [[(7 * i + 3 * n) % 90 + 5 for i in range(9 + n)] for n in range(4)]
LAYERS = TINY["num_hidden_layers"]


async def serve_in_turn(driver: Driver) -> list[int]:
    """Each prompt beside the ones before it, which decode: steps of 9, 11, 13 and 15 tokens, all padded to 16.

    Tokens of the first sequence, then of the others.
    """
    pages = {slot: [6 * slot + i for i in range(6)] for slot in range(1, 5)}
    lengths, first, others = {}, list[int](), list[int]()
    for slot, prompt in enumerate(PROMPTS, 1):
        rows = [decode(other, length) for other, length in lengths.items()]
        tokens = await driver.run([*rows, prefill(slot, prompt)], {slot: pages[slot]}, {slot: GREEDY})
        lengths = {other: length + 1 for other, length in lengths.items()} | {slot: len(prompt)}
        first.append(tokens[0])
        others.append(tokens[-1])
    return first + others[1:]


def expected() -> list[int]:
    adapter = CudaAdapter()
    return continuation(adapter, PROMPTS[0], 4) + [continuation(adapter, prompt, 1)[0] for prompt in PROMPTS[1:]]


@pytest.mark.parametrize("attention", ["torch", "xqa", "wrapper"])
async def test_a_small_step_is_a_graph_between_every_two_attentions(attention: str) -> None:
    device = FakeDevice(3)
    driver = Driver(make_executor(SMALL, device=device, attention=attention))
    before = dict(device.counts)
    assert await serve_in_turn(driver) == expected()
    assert device.counts["replay"] - before["replay"] == 3 * (LAYERS + 1), "all but the first step, which only is noted"
    assert len(driver.executor.pieces) == 1
    driver.executor.close()


async def test_without_graphs_there_are_no_pieces() -> None:
    device = FakeDevice(3)
    driver = Driver(make_executor(SMALL, device=device, cuda_graph="off"))
    assert await serve_in_turn(driver) == expected()
    assert not device.counts["replay"] and not device.counts["capture"] and not driver.executor.pieces.sizes
    driver.executor.close()


def test_sizes_are_the_least_that_hold_a_step() -> None:
    limits = dataclasses.replace(SMALL, max_num_batched_tokens=300)
    executor = make_executor(limits)
    pieces = executor.pieces
    assert pieces.sizes == [size for size in SIZES if size <= 300]
    assert [pieces.size(tokens) for tokens in (1, 16, 17, 250, 256, 257, 300)] == [16, 16, 32, 256, 256, None, None]
    executor.close()


@pytest.mark.parametrize(
    "error", [CaptureError("not this"), CapturesOver("never again"), torch.OutOfMemoryError("CUDA")], ids=str
)
async def test_what_cannot_be_captured_goes_on_as_before(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    device = FakeDevice(3)

    def failing(work: Callable[[Callable[[], None]], object]) -> Any:
        raise error

    driver = Driver(make_executor(SMALL, device=device))
    device.capture_parts = failing  # type: ignore[method-assign]
    assert await serve_in_turn(driver) == expected()
    assert not driver.executor.pieces.sizes and str(error) in caplog.text
    assert caplog.text.count("no CUDA graphs for steps") == 1
    driver.executor.close()


async def test_they_are_captured_anew_where_memory_has_moved() -> None:
    device = FakeDevice(3)
    driver = Driver(make_executor(SMALL, device=device))
    assert await serve_in_turn(driver) == expected()
    executor = driver.executor
    executor.sleep(1)
    assert not len(executor.pieces)
    executor.wake_up()
    assert await serve_in_turn(driver) == expected() and len(executor.pieces) == 1
    executor.close()


async def test_a_nan_that_a_step_leaves_behind_is_in_nobody_elses_numbers() -> None:
    driver = Driver(make_executor(SMALL, device=FakeDevice(3), attention="torch"))
    executor: Any = driver.executor
    pools = [*executor.attention.k_pools.values(), *executor.attention.v_pools.values()]
    for pool in pools:
        pool[1:].fill_(float("nan"))
    assert await serve_in_turn(driver) == expected(), "in cells that their new owner has not written"
    executor.pieces.out.fill_(float("nan"))
    await serve_in_turn(driver)
    assert all(pool[0].isfinite().all() for pool in pools), "in rows of padding"
    executor.close()

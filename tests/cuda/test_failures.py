"""Steps and warm-ups that run out of memory at their first launch, their second, ... : what is left must serve on."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from engine.executor.cuda import CUDAExecutor
from engine.request import Request
from tests.cuda.fake_device import FakeDevice
from tests.cuda.support import SMALL, CudaAdapter, make_executor, requests_of, serve
from tests.executor.driver import GREEDY, Driver, continuation, decode, prefill

A = [5, 6, 7, 8, 9, 10, 11]
EXTRAS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3, "top_k": 0},
    {},
    {"logit_bias": ((7, 5.0), (9, -50.0)), "logprobs": 2},
    {"bad_words": ((11,), (3, 5)), "prompt_logprobs": 1},
    {"frequency_penalty": 0.5, "top_p": 0.9},
]


class Failing:
    """Lets the n-th launch of every third call of a method fail. failed: how many have."""

    def __init__(self, executor: CUDAExecutor, method: str, number: int) -> None:
        self.executor, self.number = executor, number
        self.inner: Callable[..., Any] = getattr(executor, method)
        self.calls = self.failed = 0
        setattr(executor, method, self)

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.calls += 1
        device = self.executor.layer
        assert isinstance(device, FakeDevice)
        if self.calls % 3 != 2:
            return self.inner(*args, **options)
        device.launches_until_failure = self.number
        try:
            return self.inner(*args, **options)
        except torch.OutOfMemoryError:
            self.failed += 1
            raise
        finally:
            device.launches_until_failure = -1


def asked(extras: bool) -> list[Request]:
    found = requests_of(4, 6)
    if not extras:
        return found
    return [
        dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, **EXTRAS[number % len(EXTRAS)]))
        for number, request in enumerate(found)
    ]


def shorter(requests: list[Request]) -> list[Request]:
    """So that there are fewer launches, each of which fails in a run of its own."""
    return [
        dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, max_tokens=9))
        for request in requests
    ]


# What fails is the executor's, and whatever computes in it.
@pytest.mark.parametrize(
    ("method", "attention"),
    [
        ("_launch_mixed", "torch"),
        ("_launch_mixed", "wrapper"),
        ("_launch_decode", "xqa"),
        ("_launch_decode", "wrapper"),
        ("_draw_open", "torch"),
    ],
)
async def test_a_step_that_fails_at_any_launch_spoils_no_token(method: str, attention: str) -> None:
    requests = asked(extras=True)
    expected = await serve(make_executor(SMALL, attention=attention), requests)
    number, tried = 1, 0
    while True:
        executor = make_executor(SMALL, device=FakeDevice(number, (0.0, 0.4)[number % 2]), attention=attention)
        failing = Failing(executor, method, number)
        tokens = await asyncio.wait_for(serve(executor, requests), 60)
        for ours, theirs in zip(tokens, expected, strict=True):
            assert ours == theirs[: len(ours)], f"launch {number}: a token of a failed step reached a client"
        if not failing.failed:
            assert tokens == expected
            break
        tried += 1
        number += 1
    assert tried >= 1


@pytest.mark.parametrize(
    ("attention", "eagerness"), [("torch", 0.3), ("xqa", 0.0), ("xqa", 0.9), ("wrapper", 0.0), ("wrapper", 0.9)]
)
async def test_an_idle_warm_up_that_fails_at_any_launch_changes_no_token(attention: str, eagerness: float) -> None:
    """What it has launched before, the zeroing of a side's inputs above all, is still under way when a step comes."""
    expected = continuation(CudaAdapter(), A, 8)
    number = 1
    while True:
        failures = 0
        for seed in range(4):
            device = FakeDevice(10 * number + seed, eagerness)
            executor = make_executor(SMALL, device=device, attention=attention)
            driver = Driver(executor)
            tokens = await driver.run([prefill(1, A)], {1: [1, 2, 3, 4]}, {1: GREEDY})
            tokens += await driver.run([decode(1, 7)])
            warm_up = executor._warm_up

            def failing(
                *args: Any, inner: Any = warm_up, device: FakeDevice = device, number: int = number, **options: Any
            ) -> None:
                nonlocal failures
                device.launches_until_failure = number
                try:
                    inner(*args, **options)
                except torch.OutOfMemoryError:
                    failures += 1
                    raise
                finally:
                    device.launches_until_failure = -1

            executor._warm_up = failing  # type: ignore[method-assign]
            if executor._idle_timer is not None:
                executor._idle_timer.cancel()
            while executor.graphs.next_wanted() is not None:
                executor._capture_when_idle()
            for position in range(8, 14):
                tokens += await driver.run([decode(1, position)])
            executor.close()
            assert tokens == expected, f"launch {number}, seed {seed}"
        if not failures:
            break
        number += 1
    assert number > 2, "a warm-up is two launches at least"


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("eagerness", [0.0, 0.3])
async def test_graphs_of_one_parity_captured_behind_one_another(seed: int, eagerness: float) -> None:
    """Their plans share a pinned buffer: the next must not write to it before the last one's copy has read it."""
    device = FakeDevice(seed, eagerness)
    executor = make_executor(SMALL, device=device, attention="wrapper", cuda_graph="start")
    plan, behind = executor.attention.plan_decode, []

    def checked(given: Any, size: int, width: int, parity: int) -> None:
        side = executor._sides[parity]
        behind.append(side.computed.completed < side.computed.recorded)
        plan(given, size, width, parity)

    executor.attention.plan_decode = checked  # type: ignore[method-assign]
    executor.capture_at_start()
    executor.attention.plan_decode = plan  # type: ignore[method-assign]
    assert len(behind) == len(executor.graphs) == 2 * len(executor.graphs.sizes) and not any(behind)
    driver = Driver(executor)
    tokens = await driver.run([prefill(1, A)], {1: [1, 2, 3, 4]}, {1: GREEDY})
    for position in range(7, 12):
        tokens += await driver.run([decode(1, position)])
    assert tokens == continuation(CudaAdapter(), A, 6)
    executor.close()


async def test_a_step_that_fails_between_its_uploads_keeps_its_staging_until_the_first_has_read_it() -> None:
    device = FakeDevice(0, eagerness=0.0)
    executor = make_executor(SMALL, device=device, attention="wrapper")
    driver = Driver(executor)
    await driver.run([prefill(1, A)], {1: [1, 2]}, {1: GREEDY})
    upload, uploads = device.upload, []

    def failing(to: torch.Tensor, source: torch.Tensor) -> None:
        uploads.append(1)
        if len(uploads) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        upload(to, source)

    device.upload = failing  # type: ignore[method-assign]
    handle = driver.launch([decode(1, 7)])
    device.upload = upload  # type: ignore[method-assign]
    while not device.is_done(handle.side.done):  # type: ignore[attr-defined]
        assert device._step(handle.side.done)  # type: ignore[attr-defined]
    assert not device.streams[1].queue, "the step is done, and a copy still reads its staging"
    executor.close()

"""Penalties, biases, bans, log-probabilities and masks on the fake device: what the CPU executor answers."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from engine.config import EngineConfig, SchedulerOptions, StreamOptions
from engine.engine import Engine
from engine.executor.base import Executor
from engine.executor.cpu import CPUExecutor
from engine.forward import ForwardInput, TokenMasks
from engine.request import Request, SamplingParams
from tests.cuda.fake_device import FakeDevice
from tests.cuda.support import SMALL, CudaAdapter, make_executor, one_thread, tiny_model
from tests.executor.driver import GREEDY, Driver, continuation, decode, prefill

SAMPLINGS: list[dict[str, Any]] = [
    {},
    {"presence_penalty": 1.7, "logprobs": 0},
    {"frequency_penalty": 0.6, "logit_bias": ((5, 3.0), (17, 4.0)), "logprobs": 5},
    {"repetition_penalty": 1.5, "prompt_logprobs": 0, "seed": 4, "temperature": 1.0},
    {
        "repetition_penalty": 1.2,
        "presence_penalty": -0.4,
        "frequency_penalty": 0.9,
        "logprobs": 3,
        "prompt_logprobs": 2,
    },
    {"allowed_token_ids": tuple(range(40, 60)), "frequency_penalty": 2.0, "logprobs": 2},
    {"bad_words": ((7,), (9, 11), (50, 51, 52)), "temperature": 2.0, "seed": 9, "top_k": 30},
    {"logprobs": 20, "top_p": 0.7, "temperature": 1.0, "seed": 2},
    {"temperature": 1.0, "seed": 3},
]


def requests_of(seed: int) -> list[Request]:
    rng = np.random.default_rng(seed)
    requests = []
    for number, options in enumerate(SAMPLINGS):
        prompt = rng.integers(3, 100, int(rng.integers(2, 22))).tolist()
        if "bad_words" in options:
            prompt[-1] = 50
        params = SamplingParams(**{"max_tokens": 10, "temperature": 0.0, "ignore_eos": True, **options})
        requests.append(Request(f"r{number}", prompt, params, stream=bool(number % 2)))
    return requests


async def collect(executor: Executor, requests: list[Request]) -> list[tuple[list[int], Any, Any]]:
    config = EngineConfig(scheduler=SchedulerOptions(), stream=StreamOptions(flush_interval_ms=0.0))
    engine = Engine(config, executor, None)
    task = asyncio.create_task(engine.run())

    async def one(request: Request) -> tuple[list[int], Any, Any]:
        async with engine.submit(request) as stream:
            delta = await stream.collect()
            return list(delta.token_ids), delta.logprobs, stream.prompt_logprobs

    asking = asyncio.gather(*(one(request) for request in requests))
    try:
        await asyncio.wait([asking, task], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            await task
        return await asking
    finally:
        task.cancel()
        asking.cancel()
        await asyncio.gather(asking, task, return_exceptions=True)
        executor.close()


def same(ours: Any, theirs: Any) -> bool:
    """Equal but for the last digits of floats."""
    if isinstance(ours, float | np.floating):
        return bool(abs(ours - theirs) < 1e-4) or ours == theirs
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    if hasattr(ours, "__slots__"):
        return all(same(getattr(ours, name), getattr(theirs, name)) for name in ours.__slots__)
    return bool(ours == theirs)


@pytest.mark.parametrize(("seed", "mode", "processed"), [(0, "lazy", False), (1, "off", False), (2, "lazy", True)])
async def test_the_engine_answers_as_on_the_cpu(seed: int, mode: str, processed: bool) -> None:
    """processed: log-probabilities as tokens are drawn."""
    limits = dataclasses.replace(SMALL, processed_logprobs=processed)
    requests = requests_of(seed)
    device = FakeDevice(seed, (0.0, 0.3, 0.9)[seed])
    ours = await collect(make_executor(limits, device=device, cuda_graph=mode), requests)
    with one_thread():
        theirs = await collect(CPUExecutor(tiny_model(), limits, dtype=torch.float32), requests)
    for request, mine, other in zip(requests, ours, theirs, strict=True):
        assert mine[0] == other[0], request.sampling
        assert bool(mine[1]) == (request.sampling.logprobs is not None)
        assert same(mine[1], other[1]), request.sampling
        assert same(mine[2], other[2]), request.sampling


async def test_masks_hold_back_the_sampling_alone() -> None:
    """The step is launched, its draw comes when the host knows; a step behind it waits for that."""
    device = FakeDevice(5)
    executor = make_executor(SMALL, device=device)
    driver = Driver(executor)
    submit, masks = executor.submit, []

    def constrained(forward_input: ForwardInput) -> Any:
        if masks:
            forward_input.masks = masks[0]
        return submit(forward_input)

    executor.submit = constrained  # type: ignore[method-assign]
    prompt = [5, 6, 7, 8]
    expected = continuation(CudaAdapter(), prompt, 3)
    masks.append(TokenMasks([0], SMALL.vocab_size))
    first = driver.launch([prefill(1, prompt), prefill(2, prompt)], {1: [1, 2], 2: [3, 4]}, {1: GREEDY, 2: GREEDY})
    launches = device.counts["launch"]
    held = masks.pop()
    second = driver.launch([decode(1, 4), decode(2, 4)])
    assert device.counts["launch"] == launches, "nothing is launched behind a step without its masks"
    held.bits[0, 40 // 32] = 1 << 40 % 32
    held.release()
    executor.provide_masks(first)
    assert await driver.wait(first) == [40, expected[0]]
    after = continuation(CudaAdapter(), [*prompt, 40], 2)
    assert await driver.wait(second) == [after[0], expected[1]]
    # In a decode step, several times: eager, captured, replayed.
    for position, mask in ((5, None), (6, [33]), (7, [34]), (8, [35]), (9, [36])):
        if mask is not None:
            masks.append(TokenMasks([1], SMALL.vocab_size))
        handle = driver.launch([decode(2, position - 0), decode(1, position)], entries=[(1, 2, 5), (2, 2, 6)])
        if mask is not None:
            held = masks.pop()
            held.bits[0, mask[0] // 32] = 1 << mask[0] % 32
            held.release()
            executor.provide_masks(handle)
        tokens = await driver.wait(handle)
        if mask is not None:
            assert tokens[1] == mask[0]
    assert {key.draw for key in executor.graphs._graphs} == {"open"}
    executor.close()


async def test_a_step_that_failed_needs_no_masks() -> None:
    device = FakeDevice(6)
    executor = make_executor(SMALL, device=device)
    driver = Driver(executor)
    submit = executor.submit
    masks = TokenMasks([0], SMALL.vocab_size)

    def constrained(forward_input: ForwardInput) -> Any:
        forward_input.masks = masks
        device.launches_until_failure = 2
        return submit(forward_input)

    executor.submit = constrained  # type: ignore[method-assign]
    handle = driver.launch([prefill(1, [5, 6, 7])], {1: [1]}, {1: GREEDY})
    masks.release()
    executor.provide_masks(handle)
    with pytest.raises(Exception, match="memory"):
        await driver.wait(handle)
    executor.submit = submit  # type: ignore[method-assign]
    assert await driver.run([prefill(1, [5, 6, 7])]) == continuation(CudaAdapter(), [5, 6, 7], 1)
    executor.close()

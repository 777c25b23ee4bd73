"""Drafts beside what else a step may have, on the fake device: adapters, rows without numbers, and steps that fail
before they are laid out."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.executor.cuda_buffers import CudaHandle
from engine.forward import ForwardError, ForwardInput
from engine.models.parts.decoder import CausalLM
from engine.request import Request, SamplingParams
from engine.speculation.registry import make_proposer
from tests.cuda.fake_device import FakeDevice
from tests.cuda.ordered_device import OrderedDevice
from tests.cuda.support import ALWAYS, expected_tokens, reference_next, requests_of, serve, tiny_model
from tests.cuda.test_adapters import a_model, adapters_of, asked, expected, merged, one
from tests.cuda.test_drafts import Knowing, Watched, make
from tests.cuda.test_order import read_results
from tests.executor.driver import GREEDY, Driver, decode, prefill


class Telling(Knowing):
    """Of requests whose answers come from elsewhere than the tiny model."""

    def __init__(self, answers: list[tuple[Request, list[int]]], wrong: float, hesitates: bool = False) -> None:
        super().__init__([], wrong, hesitates)
        self._answers = {tuple(request.prompt_token_ids): answer for request, answer in answers}
        assert len(self._answers) == len(answers), "two requests of one prompt"


def longer(requests: list[Request]) -> list[Request]:
    """Answers that drafts are worth something for."""
    return [
        dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, max_tokens=14))
        for request in requests
    ]


# ---- adapters


def adapted(wrong: float, folder: Path, device: FakeDevice, **options: Any) -> tuple[Any, list[Request]]:
    """An executor and requests, some with each of three adapters, which it has room for two of, and some with none."""
    proposer = Telling([], wrong, hesitates=True)
    executor = make(proposer, device=device, model=a_model("llama"), **options)
    requests = longer(asked(adapters_of("llama", executor, folder), seed=2))
    proposer._answers = Telling([(each, expected("llama", each)) for each in requests], wrong)._answers
    return executor, requests


@pytest.mark.parametrize(
    ("attention", "graph", "wrong"),
    [("torch", "lazy", 0.0), ("xqa", "start", 0.3), ("wrapper", "lazy", 0.3), ("torch", "off", 1.0)],
)
async def test_rows_with_adapters_have_drafts(attention: str, graph: str, wrong: float, tmp_path: Path) -> None:
    device = FakeDevice(3, 0.3)
    executor, requests = adapted(wrong, tmp_path, device, attention=attention, cuda_graph=graph)
    if graph == "start":
        executor.capture_at_start()
    replayed = set()
    find = executor.graphs.get

    def noting(key: Any) -> Any:
        graph = find(key)
        if graph is not None:
            replayed.add((key.adapted, key.side > 1))
        return graph

    executor.graphs.get = noting
    tokens = await asyncio.wait_for(serve(executor, requests, speculation=ALWAYS), 60)
    assert tokens == [expected("llama", request) for request in requests]
    assert executor.counts["with drafts"] and executor.counts["beside prompts"]
    # Steps with drafts have graphs of their own, of rows with adapters too.
    assert graph != "start" or (True, True) in replayed


async def test_adapters_and_drafts_are_ordered(tmp_path: Path) -> None:
    device = OrderedDevice(1)
    executor, requests = adapted(0.3, tmp_path, device)
    read_results(executor, device)
    tokens = await asyncio.wait_for(serve(executor, requests, speculation=ALWAYS), 60)
    assert tokens == [expected("llama", request) for request in requests]
    assert not device.found
    assert executor.counts["with drafts"]


# ---- rows without numbers


def poisoned(token: int) -> CausalLM:
    """The tiny model, to which a token is no numbers: neither is what comes after it."""
    model = tiny_model.__wrapped__()
    model._embedding._weight[token] = torch.nan  # type: ignore[union-attr]
    return model


@pytest.mark.parametrize("attention", ["torch", "xqa", "wrapper"])
@pytest.mark.parametrize(("wrong", "seed"), [(0.0, 1), (0.5, 2)])
async def test_rows_without_numbers_and_rows_with_drafts(attention: str, wrong: float, seed: int) -> None:
    """Who says the token ends there; wrong drafts of it hurt nobody, nor do the pages that they stood in."""
    requests = longer(requests_of(seed))
    answers = [expected_tokens(tiny_model(), request) for request in requests]
    # Said in the middle of some answer, and by few.
    said = np.array(answers)[:, 3:10].ravel()
    prompts = {token for request in requests for token in request.prompt_token_ids}
    token = next(int(each) for each in said if int(each) not in prompts)

    class Poisoning(Knowing):
        """What it drafts wrongly is that token."""

        def draft(self, slot: int, most: int) -> list[int]:
            right = super().draft(slot, most)
            known = [bool(self._generator.random() < wrong) for _ in right]
            return [token if spoil else each for each, spoil in zip(right, known, strict=True)]

    executor = make(Poisoning(requests, 0.0), device=FakeDevice(seed, 0.3), attention=attention, model=poisoned(token))
    broken: list[int] = []
    follow = executor._follow

    def noting(handle: CudaHandle, output: Any) -> None:
        if handle.drafted is not None and handle.drafted.shift:
            broken.append(len(output.broken))
        follow(handle, output)

    executor._follow = noting
    tokens = await asyncio.wait_for(serve(executor, requests, speculation=ALWAYS), 60)
    for ours, theirs in zip(tokens, answers, strict=True):
        if token in theirs[:-1]:
            # Of a step that ends so its other tokens are not told either.
            assert ours == theirs[: len(ours)] and len(ours) <= theirs.index(token) + 1
        else:
            assert ours == theirs
    assert any(token in answer[:-1] for answer in answers) and any(broken)
    layer = executor.attention
    assert all(pool.isfinite().all() for pool in [*layer.k_pools.values(), *layer.v_pools.values()])


# ---- steps that fail before they are laid out


class Raising(Telling):
    """Raises where it is asked as a step begins, so many times."""

    def __init__(self, answers: list[tuple[Request, list[int]]], times: int = 1) -> None:
        super().__init__(answers, 0.0)
        self.times, self.beginning = times, False

    def propose(self, slots: Any, most: Any) -> list[list[int]]:
        if self.beginning and self.times:
            self.times -= 1
            raise RuntimeError("no idea")
        return super().propose(slots, most)


class Asking(Watched):
    """Looks for drafts as a step begins, not when the one before it ends. early: the steps that failed in it, by the
    adapters that they brought."""

    early: list[int]

    def _wanted(self, given: ForwardInput, slots: Any) -> set[int]:
        return set()

    def _needs_tokens(self, given: ForwardInput) -> bool:
        return self._in_flight > 1 and given.num_speculating_rows > 0

    def _with_drafts(self, given: ForwardInput, handle: CudaHandle) -> ForwardInput:
        assert self._speculator is not None
        proposer = self._speculator._early
        assert isinstance(proposer, Raising)
        proposer.beginning = True
        try:
            return super()._with_drafts(given, handle)
        except RuntimeError:
            self.early.append(len(given.adapter_loads))
            raise
        finally:
            proposer.beginning = False


async def test_a_proposer_that_raises_costs_a_step_alone() -> None:
    requests = longer(requests_of(1))
    answers = [(each, expected_tokens(tiny_model(), each)) for each in requests]
    executor = make(Raising(answers), device=FakeDevice(2, 0.3), kind=Asking)
    executor.early = []
    tokens = await asyncio.wait_for(serve(executor, requests, speculation=ALWAYS), 60)
    assert tokens == [answer for _, answer in answers]
    assert executor.early == [0] and executor.counts["drafts"]


async def test_an_adapter_that_comes_with_such_a_step_is_brought_by_the_next(tmp_path: Path) -> None:
    """As are its page table, and how its rows are drawn: a step says so once."""
    executor = make(make_proposer(ALWAYS), device=FakeDevice(1, 0.3), model=a_model("llama"))
    (adapter,) = adapters_of("llama", executor, tmp_path, count=1)
    lay_out, failed = executor._with_drafts, []

    def failing(given: ForwardInput, handle: CudaHandle) -> ForwardInput:
        if not failed:
            failed.append(given.step)
            raise RuntimeError("no idea")
        return lay_out(given, handle)

    executor._with_drafts = failing
    driver = Driver(executor)
    prompt = one(adapter).prompt_token_ids[:12]
    hot = SamplingParams(temperature=2.0, top_k=2, seed=5)
    handle = driver.launch([prefill(1, prompt)], {1: [1, 2, 3, 4, 5]}, {1: hot}, adapters=[adapter.weights])
    with pytest.raises(ForwardError, match="no idea"):
        await driver.wait(handle)
    tokens = list(prompt)
    tokens += await driver.run([prefill(1, prompt)])
    for _ in range(6):
        tokens += await driver.run([decode(1, len(tokens) - 1)])
    for end in range(len(prompt), len(tokens)):
        assert tokens[end] == reference_next(merged("llama", 1), tokens[:end], hot)
    executor.close()


async def test_an_index_that_is_nobodys_is_given_back(tmp_path: Path) -> None:
    """Its page-locked memory is free as soon as no copy reads it, also where its step was to bring it there first."""
    executor = make(make_proposer(ALWAYS), device=FakeDevice(1, 0.3), model=a_model("llama"))
    adapters = executor._adapters
    (adapter,) = adapters_of("llama", executor, tmp_path, count=1)
    driver = Driver(executor)
    prompt = one(None).prompt_token_ids[:8]
    await driver.wait(driver.launch([prefill(1, prompt)], {1: [1, 2, 3]}, {1: GREEDY}, adapters=[adapter.weights]))
    assert adapters._held == {1: adapter.weights} and not adapters._pending
    await driver.wait(driver.launch([prefill(2, prompt)], {2: [4, 5, 6]}, {2: GREEDY}, adapters=[None]))
    assert not adapters._held and not adapters._pending
    # Its step fails before it brings it, and the next one says that it is nobody's.
    executor._with_drafts = _refuse
    with pytest.raises(ForwardError, match="no idea"):
        await driver.wait(driver.launch([prefill(1, prompt)], {1: [1, 2, 3]}, {1: GREEDY}, adapters=[adapter.weights]))
    assert adapters._held == adapters._pending == {1: adapter.weights}
    del executor._with_drafts
    brought: list[int] = []
    adapters._upload = lambda index, weights: brought.append(index)
    await driver.wait(driver.launch([prefill(2, prompt)], {2: [4, 5, 6]}, {2: GREEDY}, adapters=[None]))
    assert not adapters._held and not adapters._pending and not brought
    executor.close()


def _refuse(given: ForwardInput, handle: CudaHandle) -> ForwardInput:
    raise RuntimeError("no idea")

"""Rows under a grammar with drafts that the device has made, on the fake device: the answers are those without drafts.

What may be said at a drafted position hangs on the draft before it, so that masks of drafts that the host has not seen,
or has seen too early, let something else be said.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.executor.base import StepHandle
from engine.executor.cuda import CUDAExecutor
from engine.executor.cuda_buffers import CudaHandle
from engine.forward import DeviceLostError
from engine.request import Request
from engine.stream import Delta
from tests.cuda import test_draft_heads as heads
from tests.cuda.fake_device import FakeDevice
from tests.cuda.ordered_device import OrderedDevice
from tests.cuda.support import NO_DRAFTS, SMALL, answers_of, make_executor, requests_of, tiny_model
from tests.cuda.test_adapters import a_model, adapters_of
from tests.cuda.test_adapters import asked as with_adapters
from tests.cuda.test_draft_heads import EAGLE, LIMITS, WITHOUT, apart, make_eagle, target
from tests.cuda.test_draft_models import MODEL, OTHER, Counting, assert_said, itself, longer, make, other, with_net
from tests.cuda.test_drafts import DRAFTS
from tests.cuda.test_failures import Failing, shorter
from tests.cuda.test_order import read_results
from tests.sim.workload import Runs
from tests.speculation import test_eagle3 as eagle3


class Chain:
    """A constraint: three quarters of the ids may follow an id, other ones after each. A multiple of `ends` ends it."""

    is_free = False
    error: str | None = None

    def __init__(self, vocab_size: int, ends: int) -> None:
        self.vocab_size, self.ends = vocab_size, ends
        self.seen: list[int] = []

    def allowed(self) -> np.ndarray:
        before = self.seen[-1] if self.seen else 0
        return (np.arange(self.vocab_size) * 3 + before * 5) % 4 != 1

    def mask_into(self, mask: Any) -> None:
        bits = np.zeros(32 * len(mask), np.uint8)
        bits[: self.vocab_size] = self.allowed()
        mask[:] = np.packbits(bits, bitorder="little").view(np.uint32)

    def forced_tokens(self) -> list[int]:
        return []

    def copy(self) -> Chain:
        other = copy.copy(self)
        other.seen = list(self.seen)
        return other

    def accept(self, token_id: int) -> None:
        assert not self.is_finished and self.allowed()[token_id], "a token that the mask forbids"
        self.seen.append(token_id)

    @property
    def is_finished(self) -> bool:
        return len(self.seen) > 2 and self.seen[-1] % self.ends == 0


def bound(requests: list[Request], vocab_size: int = 101, forces: bool = True) -> list[Request]:
    """Two of three have a grammar, some of which force tokens; every second one asks for log-probabilities. Made anew,
    for constraints remember."""
    found = []
    for number, request in enumerate(requests):
        params = request.sampling
        if number % 2:
            params = dataclasses.replace(params, logprobs=number % 4)
        constraint: Any = None
        if number % 3:
            constraint = Chain(vocab_size, 13)
            if forces and number % 3 == 2:
                constraint = Runs(number, vocab_size, free=3, run=number % 4, length=14)
        found.append(dataclasses.replace(request, sampling=params, constraint=constraint))
    return found


def assert_same(found: list[Delta], expected: list[Delta]) -> None:
    """Tokens and ends to the last, figures up to their last places."""
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.token_ids, ours.finish_reason, ours.error) == (
            theirs.token_ids,
            theirs.finish_reason,
            theirs.error,
        )
        assert len(ours.logprobs) == len(theirs.logprobs)
        for one, two in zip(ours.logprobs, theirs.logprobs, strict=True):
            assert (one.token_id, one.rank) == (two.token_id, two.rank)
            assert one.logprob == pytest.approx(two.logprob, abs=1e-4)
            assert [token for token, _ in one.top] == [token for token, _ in two.top]
            assert [value for _, value in one.top] == pytest.approx([value for _, value in two.top], abs=1e-4)


class Seeing(Counting):
    """counts, too: drafts that masks were made for, those of them that were right, and drafts that waited for none."""

    def _drafts_seen(self, handle: CudaHandle) -> Any:  # type: ignore[override]
        # The forward that checks them is launched already, and draws when the masks are there.
        assert handle.draw is not None and handle is self._undrawn
        found = super()._drafts_seen(handle)
        self.counts["seen"] += sum(len(drafts) for _, drafts in found)
        return found

    def _follow(self, handle: CudaHandle, output: Any) -> None:
        super()._follow(handle, output)
        if handle.early is None or handle.drafted is None or handle.given is None:
            return
        step, masks = handle.given, handle.given.masks
        rows = set(masks.rows.tolist()) if masks is not None else set()
        for index in range(step.num_speculating_rows):
            right = int(output.accepted.counts[index]) - 1
            self.counts["right, bound" if step.num_decode_rows + index in rows else "right, beside"] += right


async def without(requests: list[Request], **options: Any) -> list[Delta]:
    return await asyncio.wait_for(answers_of(make_executor(options.pop("limits", SMALL), **options), requests), 60)


@pytest.mark.parametrize(
    ("attention", "mode", "seed", "overlap", "forces"),
    [
        ("torch", "lazy", 0, True, True),
        ("xqa", "start", 1, True, False),
        ("wrapper", "off", 2, False, True),
        ("wrapper", "lazy", 3, True, False),
        ("xqa", "start", 1, True, True),
    ],
)
async def test_answers_are_those_without_drafts(
    attention: str, mode: str, seed: int, overlap: bool, forces: bool
) -> None:
    requests = longer(requests_of(seed, 9))
    expected = await without(bound(requests, forces=forces))
    device = FakeDevice(seed, (0.0, 0.3, 0.9)[seed % 3])
    executor = make(with_net(itself, attention), kind=Seeing, device=device, attention=attention, cuda_graph=mode)
    if mode == "start":
        executor.capture_at_start()
    found = await asyncio.wait_for(
        answers_of(executor, bound(requests, forces=forces), speculation=MODEL, overlap=overlap), 60
    )
    assert_same(found, expected)
    counts = executor.counts
    assert counts["seen"] > counts["right, bound"] > 5 and counts["right, beside"] > 5


async def test_what_is_drafted_is_what_the_model_says() -> None:
    """Also behind tokens that were forced, which it reads as it does a prompt."""
    requests = longer(requests_of(5, 9))
    executor = make(with_net(other), kind=Seeing, device=FakeDevice(2, 0.3))
    found = await asyncio.wait_for(answers_of(executor, bound(requests), speculation=MODEL), 60)
    assert_same(found, await without(bound(requests)))
    assert executor.counts["seen"] > 40
    assert_said(executor, tiny_model(json.dumps(OTHER)))


async def test_few_pages() -> None:
    """Sequences are retracted."""
    limits = dataclasses.replace(DRAFTS, num_pages=22)
    requests = longer(requests_of(11, 9))
    executor = make(with_net(itself), limits, kind=Seeing, device=FakeDevice(3, 0.3))
    found = await asyncio.wait_for(answers_of(executor, bound(requests), speculation=MODEL), 60)
    assert_same(found, await without(bound(requests)))
    assert executor.counts["right, bound"] > 5


async def test_rows_with_adapters(tmp_path: Path) -> None:
    answers: list[list[Delta]] = []
    for speculation in (NO_DRAFTS, MODEL):
        executor: Any = make_executor(SMALL, model=a_model("llama"))  # which takes the model from the one before it
        if answers:
            executor = make(with_net(itself), kind=Seeing, device=FakeDevice(3, 0.3), model=a_model("llama"))
        folder = tmp_path / str(len(answers))
        requests = longer(with_adapters(adapters_of("llama", executor, folder), seed=2))
        answers.append(await asyncio.wait_for(answers_of(executor, bound(requests), speculation=speculation), 60))
    assert_same(answers[1], answers[0])
    assert executor.counts["seen"] > 20


@pytest.mark.parametrize(("attention", "seed"), [("torch", 1), ("xqa", 2), ("wrapper", 3)])
async def test_heads(attention: str, seed: int, tmp_path: Path) -> None:
    """Behind tokens that were forced, too, what is drafted is the formula's."""
    _, tensors = eagle3.write_head(tmp_path, "plain", norm_before_residual=False)
    requests = apart(longer(requests_of(seed, 9)))
    expected = await without(bound(requests, eagle3.VOCAB), limits=WITHOUT, model=target())
    executor = make_eagle(tmp_path, attention, device=FakeDevice(seed, 0.3), kind=Seeing)
    found = await asyncio.wait_for(answers_of(executor, bound(requests, eagle3.VOCAB), speculation=EAGLE), 60)
    assert_same(found, expected)
    assert executor.counts["seen"] > 20 and executor.limits == LIMITS
    heads.assert_said(executor, tensors)


@pytest.mark.parametrize("attention", ["torch", "xqa", "wrapper"])
async def test_everything_is_ordered(attention: str) -> None:
    device = OrderedDevice(1)
    requests = longer(requests_of(1, 9))
    executor = make(with_net(itself, attention), kind=Seeing, device=device, attention=attention)
    read_results(executor, device)
    await asyncio.wait_for(answers_of(executor, bound(requests), speculation=MODEL), 60)
    assert not device.found and executor.counts["seen"]


# ---- failures


@pytest.mark.parametrize("method", ["_launch_decode", "_launch_mixed", "_launch_drafts", "_draw_open"])
async def test_a_step_that_fails_at_any_launch_spoils_no_token(method: str) -> None:
    requests = shorter(requests_of(4, 6))
    expected = await without(bound(requests))
    for number in range(1, 60):
        executor = make(with_net(itself), kind=Seeing, device=FakeDevice(number, (0.0, 0.4)[number % 2]))
        failing = Failing(executor, method, number)
        found = await asyncio.wait_for(answers_of(executor, bound(requests), speculation=MODEL), 60)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.token_ids == theirs.token_ids[: len(ours.token_ids)], f"launch {number}"
        if not failing.failed:
            assert_same(found, expected)
            break
    else:
        pytest.fail("it never came through")
    assert executor.counts["seen"]


async def test_a_device_that_is_lost_before_its_drafts_are_seen() -> None:
    requests = longer(requests_of(1, 6))
    device = FakeDevice(1)
    executor = make(with_net(itself), kind=Seeing, device=device)
    wait, times = executor._waiter.wait, 0

    async def losing(event: Any) -> None:
        nonlocal times
        times += event in (executor._sides[2].told, executor._sides[3].told)
        if times == 3:
            raise RuntimeError("gone")
        await wait(event)

    executor._waiter.wait = losing
    with pytest.raises(DeviceLostError, match="gone"):
        await asyncio.wait_for(answers_of(executor, bound(requests), speculation=MODEL), 60)
    assert times == 3


# ---- mistakes


class Unseen(Counting):
    """Masks are made of what was drafted before, which is nothing."""

    def unseen_drafts(self, handle: StepHandle) -> None:
        return None


class Early(Counting):
    """Drafts are read before they are there."""

    async def _see_drafts(self, handle: CudaHandle) -> Any:
        return self._drafts_seen(handle)


class Others(Counting):
    """Drafts are said to be another row's."""

    def _drafts_seen(self, handle: CudaHandle) -> Any:  # type: ignore[override]
        found = super()._drafts_seen(handle)
        return [(row, drafts) for (row, _), (_, drafts) in zip(found, found[1:] + found[:1], strict=True)]


@pytest.mark.parametrize("kind", [Unseen, Early, Others])
@pytest.mark.filterwarnings("ignore")
async def test_mutant_is_caught(kind: type[CUDAExecutor]) -> None:
    for seed in range(4):
        requests = longer(requests_of(seed, 9))
        expected = await without(bound(requests))
        executor = make(with_net(itself), device=FakeDevice(seed, (0.0, 0.5)[seed % 2]), kind=kind)
        try:
            found = await asyncio.wait_for(answers_of(executor, bound(requests), speculation=MODEL), 30)
            assert_same(found, expected)
        except Exception:
            return
    pytest.fail("nothing noticed")

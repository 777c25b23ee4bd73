"""Draft models beside what else a step may have, on the fake device: adapters, rows without numbers, penalties and
grammars, launches that fail, memory that moves."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.config import CacheOptions
from engine.executor.cuda import CUDAExecutor
from engine.executor.cuda_buffers import CudaHandle, Side
from engine.executor.cuda_drafter import DeviceDrafter, Reading
from engine.executor.cuda_start import build_cuda_executor
from engine.executor.drafting import ModelDrafting
from engine.forward import ForwardInput, Limits
from engine.models.offload import _storages as storages_of
from engine.speculation.nets import ModelNet, Net
from engine.speculation.paged import LateProposer
from tests.cuda.fake_device import FakeDevice
from tests.cuda.ordered_device import OrderedDevice
from tests.cuda.support import (
    SMALL,
    expected_tokens,
    fail_steps,
    make_executor,
    requests_of,
    serve,
    tiny_directory,
    tiny_model,
)
from tests.cuda.test_adapters import a_model, adapters_of, asked, expected
from tests.cuda.test_draft_models import (
    MODEL,
    OTHER,
    Counting,
    assert_ended_by,
    assert_said,
    itself,
    longer,
    make,
    other,
    with_net,
)
from tests.cuda.test_drafts import DeviceScript, assert_answers, model_of, plain
from tests.cuda.test_drafts_beside import poisoned
from tests.cuda.test_failures import Failing
from tests.cuda.test_failures import asked as with_extras
from tests.cuda.test_order import read_results
from tests.executor.test_speculation import PROBES


@pytest.mark.parametrize(("attention", "graph"), [("torch", "lazy"), ("xqa", "start"), ("wrapper", "off")])
async def test_rows_with_adapters_have_drafts(attention: str, graph: str, tmp_path: Path) -> None:
    """Of the model without any."""
    executor = make(
        with_net(itself, attention),
        device=FakeDevice(3, 0.3),
        attention=attention,
        cuda_graph=graph,
        model=a_model("llama"),
    )
    if graph == "start":
        executor.capture_at_start()
    requests = longer(asked(adapters_of("llama", executor, tmp_path), seed=2))
    tokens = await asyncio.wait_for(serve(executor, requests, speculation=MODEL), 60)
    assert tokens == [expected("llama", request) for request in requests]
    assert executor.counts["made"] > executor.counts["accepted"] > 0


async def test_adapters_and_drafts_are_ordered(tmp_path: Path) -> None:
    device = OrderedDevice(1)
    executor = make(with_net(other), device=device, model=a_model("llama"))
    requests = longer(asked(adapters_of("llama", executor, tmp_path), seed=2))
    read_results(executor, device)
    tokens = await asyncio.wait_for(serve(executor, requests, speculation=MODEL), 60)
    assert tokens == [expected("llama", request) for request in requests]
    assert not device.found and executor.counts["made"]


@pytest.mark.parametrize(("attention", "seed"), [("torch", 1), ("xqa", 2), ("wrapper", 1)])
async def test_rows_without_numbers(attention: str, seed: int) -> None:
    """Who says a token that is none to the model ends there; drafts of it hurt nobody."""
    requests = longer(requests_of(seed))
    answers = [expected_tokens(tiny_model(), request) for request in requests]
    prompts = {token for request in requests for token in request.prompt_token_ids}
    token = next(int(each) for each in np.array(answers)[:, 3:10].ravel() if int(each) not in prompts)
    executor = make(
        with_net(itself, attention), device=FakeDevice(seed, 0.3), attention=attention, model=poisoned(token)
    )
    tokens = await asyncio.wait_for(serve(executor, requests, speculation=MODEL), 60)
    assert_ended_by(token, executor, tokens, answers)


# ---- penalties, grammars, log-probabilities


@dataclasses.dataclass
class ModelScript(DeviceScript):
    """Drafts of the model itself."""

    def make(self, limits: Limits, late: LateProposer | None) -> CUDAExecutor:
        device = FakeDevice(self.seed, (0.0, 0.3, 0.9)[self.seed % 3])

        def net() -> Net:
            return ModelNet(self.model, None, torch.device("cpu"))

        drafts = with_net(net, self.attention, context=96)
        executor = make(drafts, limits, device=device, attention=self.attention, model=self.model)
        self.counts = executor.counts
        return executor  # type: ignore[no-any-return]


@pytest.mark.parametrize(("attention", "most", "depth"), [("torch", 4, 2), ("xqa", 8, 1), ("wrapper", 3, 2)])
async def test_everything_that_may_be_asked_for(attention: str, most: int, depth: int) -> None:
    """The grammar here looks at no draft: one that does is in test_draft_grammars.py."""
    answers = await plain()
    script = ModelScript(model_of(), torch.float32, None, most, depth, attention=attention, seed=most)
    found = await script.run(list(range(len(PROBES))))
    assert_answers(found, answers)
    assert script.num_accepted > 10 and script.counts["made"]


# ---- failures


@pytest.mark.parametrize("seed", range(2))
async def test_a_failed_step_is_computed_again(seed: int) -> None:
    """What the model had read of it is not all read again, which costs a little."""
    requests = longer(requests_of(seed), temperature=0.0)
    executor = make(with_net(itself), device=FakeDevice(seed, 0.3))
    fail_steps(executor, frozenset({4 + seed, 11}))
    tokens = await serve(executor, requests, speculation=MODEL)
    assert tokens == [expected_tokens(tiny_model(), request) for request in requests]
    counts = executor.counts
    assert counts["drafted"] > counts["accepted"] > counts["drafted"] - 10


@pytest.mark.parametrize(
    ("method", "attention"),
    [("_launch_mixed", "wrapper"), ("_launch_decode", "xqa"), ("_draw_open", "torch"), ("_launch_drafts", "torch")],
)
async def test_a_step_that_fails_at_any_launch_spoils_no_token(method: str, attention: str) -> None:
    requests = with_extras(extras=True)
    answers = await serve(make_executor(SMALL, attention=attention), requests)
    number = 1
    while True:
        device = FakeDevice(number, (0.0, 0.4)[number % 2])
        executor = make(with_net(itself, attention), device=device, attention=attention)
        failing = Failing(executor, method, number)
        tokens = await asyncio.wait_for(serve(executor, requests, speculation=MODEL), 60)
        for ours, theirs in zip(tokens, answers, strict=True):
            assert ours == theirs[: len(ours)], f"launch {number}: a token of a failed step reached a client"
        if not failing.failed:
            assert tokens == answers
            break
        number += 1
    assert number > 2 or method == "_draw_open"
    assert executor.counts["made"]


async def test_drafts_that_cannot_be_laid_out_cost_a_step_alone() -> None:
    requests = longer(requests_of(1))
    executor = make(with_net(other), device=FakeDevice(2, 0.3))
    lay_out, calls = executor._drafter.lay_out, Counter[str]()

    def failing(*given: Any) -> Any:
        found = lay_out(*given)
        calls["laid out"] += 1
        if calls["laid out"] in (5, 9):
            raise RuntimeError("no idea")
        return found

    executor._drafter.lay_out = failing
    tokens = await asyncio.wait_for(serve(executor, requests, speculation=MODEL), 60)
    assert tokens == [expected_tokens(tiny_model(), request) for request in requests]


# ---- the start, and memory that moves


@pytest.mark.parametrize("mode", ["lazy", "start"])
async def test_start_makes_room(mode: str) -> None:
    rows: dict[str, str] = {}
    model = tiny_model.__wrapped__()
    device = FakeDevice(2, 0.3)
    drafting = ModelDrafting(MODEL, tiny_directory(), tiny_directory(), 101, tiny_model.__wrapped__(), 64)
    executor = build_cuda_executor(
        model,
        device,  # type: ignore[arg-type]
        CacheOptions(num_pages=40, page_size=4),
        dtype=torch.float32,
        max_num_seqs=4,
        max_num_batched_tokens=24,
        max_model_len=64,
        cuda_graph=mode,
        row=rows.__setitem__,
        speculation=MODEL,
        drafting=drafting,
    )
    assert rows["drafting"].startswith("up to 4 a row")
    requests = longer(requests_of(7, 4), temperature=0.0)
    counts = Counter[str]()
    follow = executor._follow

    def noting(handle: CudaHandle, output: Any) -> None:
        follow(handle, output)
        if output.accepted is not None:
            counts["drafted"] += int(output.accepted.num_drafted.sum())
            counts["accepted"] += int(output.accepted.counts.sum()) - len(output.accepted.counts)

    executor._follow = noting  # type: ignore[method-assign]
    assert await serve(executor, requests, speculation=MODEL) == [expected_tokens(tiny_model(), r) for r in requests]
    assert counts["drafted"] == counts["accepted"] > 20


@pytest.mark.parametrize("level", [1, 2])
async def test_sleep_and_other_weights(level: int) -> None:
    """Pages of drafts sleep with the others, and graphs hold no memory that is gone."""
    requests = longer(requests_of(4), temperature=0.0)
    answers = [expected_tokens(tiny_model(), request) for request in requests]
    executor = make(with_net(itself), device=FakeDevice(4, 0.3), model=tiny_model.__wrapped__())
    executor.close, close = lambda: None, executor.close
    for turn in range(3):
        again = [dataclasses.replace(each, request_id=f"{each.request_id}-{turn}") for each in requests]
        assert await serve(executor, again, speculation=MODEL) == answers
        if turn == 0:
            executor.sleep(level)
            assert not any(storage.nbytes() for storage in storages_of(executor._drafter.net.weights))
            assert not executor._drafter.attention.buffers
            executor.wake_up()
        elif turn == 1:
            executor.load_weights(tiny_directory())
        executor.num_steps = 0
    close()


# ---- mistakes


class WrongRows(DeviceDrafter):
    """Drafts go to the rows beside theirs."""

    def lay_out(self, step: ForwardInput, given: ForwardInput) -> Reading | None:
        reading = super().lay_out(step, given)
        if reading is not None:
            rows = [row for row, _, _ in reading.spots]
            reading.spots = [(row, *spot[1:]) for row, spot in zip(rows[1:] + rows[:1], reading.spots, strict=True)]
        return reading


class BeforeDiffs(Counting):
    """A step's pages come after what its drafts write."""

    def _launch_drafts(self, side: Side, handle: CudaHandle) -> None:
        tables = self._page_tables
        assert self._drafter is not None
        self._drafter._page_tables = torch.zeros_like(tables)
        super()._launch_drafts(side, handle)


class Untold(Counting):
    """The host is not told what was drafted."""

    def _follow(self, handle: CudaHandle, output: Any) -> None:
        handle.told.clear()
        super()._follow(handle, output)


class Unforgetting(DeviceDrafter):
    """Of drafts that were wrong, too, it holds what it read to be right."""

    def follow(self, step: ForwardInput, rows: Any, hidden: Tensor | None, aux: list[Tensor]) -> None:
        before = {slot: (state.at, state.fed) for slot, state in self._slots.items()}
        super().follow(step, rows, hidden, aux)
        for slot, (at, fed) in before.items():
            if fed and slot in self._slots:
                self._slots[slot].done = at + fed


class NoPrompts(DeviceDrafter):
    """It reads no prompts, and holds that it has."""

    def read_prompts(self, *given: Any) -> None:
        pass


MUTANTS: list[tuple[type[CUDAExecutor], type[DeviceDrafter]]] = [
    (Counting, WrongRows),
    (BeforeDiffs, DeviceDrafter),
    (Untold, DeviceDrafter),
    (Counting, Unforgetting),
    (Counting, NoPrompts),
]


@pytest.mark.parametrize(("kind", "drafter"), MUTANTS)
@pytest.mark.filterwarnings("ignore")
async def test_mutant_is_caught(
    kind: type[CUDAExecutor], drafter: type[DeviceDrafter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the text, or by a draft that is not what the model says."""
    monkeypatch.setattr("engine.executor.cuda_drafts.DeviceDrafter", drafter)
    for seed in range(6):
        requests = longer(requests_of(seed, 6))
        executor = make(with_net(other), device=FakeDevice(seed, (0.0, 0.5)[seed % 2]), kind=kind)
        try:
            tokens = await asyncio.wait_for(serve(executor, requests, speculation=MODEL), 30)
            assert tokens == [expected_tokens(tiny_model(), request) for request in requests]
            assert_said(executor, tiny_model(json.dumps(OTHER)))
        except Exception:
            return
    pytest.fail("nothing noticed")

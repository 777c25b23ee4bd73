"""Models with a recurrent state and drafts, on the fake device: states follow only the tokens that were right."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.executor.cuda import CUDAExecutor
from engine.executor.cuda_device import Graph
from engine.executor.cuda_graph import GraphKey
from engine.forward import ForwardInput, Limits
from engine.models.parts.decoder import CausalLM, Decoder
from engine.ops import native
from engine.ops.state import StatePlan, States
from engine.request import Request
from engine.speculation.mtp import load_mtp
from engine.speculation.nets import HeadNet
from engine.speculation.registry import make_proposer
from engine.stream import Delta
from tests.cuda.fake_device import FakeDevice
from tests.cuda.ordered_device import OrderedDevice
from tests.cuda.support import (
    ALWAYS,
    BESIDE,
    HYBRID,
    NO_DRAFTS,
    SMALL,
    TINY,
    answers_of,
    expected_tokens,
    fail_steps,
    make_executor,
    requests_of,
    serve,
    tiny_model,
)
from tests.cuda.test_adapters import a_model, adapters_of
from tests.cuda.test_adapters import asked as with_adapters
from tests.cuda.test_draft_grammars import Seeing, assert_same, bound
from tests.cuda.test_draft_heads import MTP, apart, read_target
from tests.cuda.test_draft_models import MODEL, other, with_net
from tests.cuda.test_draft_models import make as make_model
from tests.cuda.test_draft_penalties import penalised
from tests.cuda.test_drafts import make, repeating
from tests.cuda.test_drafts_beside import Telling, longer
from tests.cuda.test_failures import Failing, shorter
from tests.cuda.test_order import read_results
from tests.speculation import test_mtp as mtp

# Short convolutions, beside gated delta nets and Mamba 2.
CONVOLVED = {
    **TINY,
    "num_hidden_layers": 3,
    "architectures": ["Lfm2ForCausalLM"],
    "layer_types": ["conv", "full_attention", "conv"],
    "block_auto_adjust_ff_dim": False,
}
CONFIGS = {"delta": HYBRID, "mamba": BESIDE, "convolution": CONVOLVED}
# Few snapshots, so that texts go on from some, and some are lost.
WITHOUT = dataclasses.replace(SMALL, num_snapshots=3)
LIMITS = dataclasses.replace(WITHOUT, max_draft_tokens=4)


def model_of(kind: str) -> CausalLM:
    return tiny_model(json.dumps(CONFIGS[kind]))


def told(model: CausalLM, requests: list[Request]) -> list[tuple[Request, list[int]]]:
    return [(each, expected_tokens(model, each)) for each in requests]


async def without(model: CausalLM, requests: list[Request], limits: Limits = WITHOUT) -> list[Delta]:
    return await asyncio.wait_for(answers_of(make_executor(limits, model=model), requests), 60)


# Every kind of state meets every attention in one of three tests: here, under grammars, or where all is ordered.
@pytest.mark.parametrize(
    ("kind", "attention", "mode", "seed", "wrong"),
    [
        ("delta", "torch", "lazy", 0, 0.0),
        ("mamba", "xqa", "start", 1, 0.3),
        ("convolution", "wrapper", "off", 2, 0.4),
        ("convolution", "torch", "lazy", 3, 1.0),
    ],
)
async def test_tokens_are_the_references(kind: str, attention: str, mode: str, seed: int, wrong: float) -> None:
    """In graphs, beside prompts, and where prefixes go on from snapshots."""
    model, requests = model_of(kind), longer(requests_of(seed, 10))
    device = FakeDevice(seed, (0.0, 0.3, 0.9)[seed % 3])
    executor = make(
        Telling(told(model, requests), wrong, hesitates=seed == 1),
        LIMITS,
        device=device,
        attention=attention,
        cuda_graph=mode,
        model=model,
    )
    saved, loaded = [], []
    move = executor._states.move

    def noting(step: ForwardInput) -> None:
        saved.append(step.num_saves)
        loaded.append(step.num_loads)
        move(step)

    executor._states.move = noting
    replayed = set()
    find = executor.graphs.get

    def finding(key: GraphKey) -> Graph | None:
        if (graph := find(key)) is not None:
            replayed.add(key.side > 1)
        return graph

    executor.graphs.get = finding
    if mode == "start":
        executor.capture_at_start()
    tokens = await asyncio.wait_for(serve(executor, requests, speculation=ALWAYS), 60)
    assert tokens == [expected_tokens(model, request) for request in requests]
    assert sum(saved) and sum(loaded)
    assert executor.counts["with drafts"] and executor.counts["beside prompts"]
    # With "start" steps with drafts have graphs of their own, of rows that draw from all that there is.
    assert mode != "start" or True in replayed
    assert mode != "off" or not device.counts["replay"]


@pytest.mark.parametrize("kind", CONFIGS)
async def test_long_answers_in_few_pages(kind: str) -> None:
    """Sequences are retracted, and leave states behind as they grow, which others and they themselves go on from."""
    model = model_of(kind)
    requests = repeating(11, 8)
    again = [dataclasses.replace(each, request_id=f"{each.request_id}-again") for each in requests]
    limits = dataclasses.replace(LIMITS, num_pages=26)
    executor = make(make_proposer(ALWAYS), limits, device=FakeDevice(3, 0.3), model=model)
    tokens = await asyncio.wait_for(serve(executor, [*requests, *again], speculation=ALWAYS), 60)
    assert tokens == 2 * [expected_tokens(model, request) for request in requests]
    assert executor.counts["drafts"]


@pytest.mark.parametrize(
    ("kind", "attention", "seed"), [("mamba", "torch", 1), ("convolution", "xqa", 2), ("delta", "wrapper", 3)]
)
async def test_grammars_and_penalties(kind: str, attention: str, seed: int) -> None:
    """Forced runs go on from the state before the drafts of their step."""
    model = model_of(kind)

    def asked() -> list[Request]:
        found = [*bound(longer(requests_of(seed, 6))), *penalised(requests_of(seed + 7, 6))]
        return [dataclasses.replace(each, request_id=f"r{number}") for number, each in enumerate(found)]

    expected = await without(model, asked())
    answers = [(request, delta.token_ids) for request, delta in zip(asked(), expected, strict=True)]
    executor = make(Telling(answers, 0.3), LIMITS, device=FakeDevice(seed, 0.3), attention=attention, model=model)
    found = await asyncio.wait_for(answers_of(executor, asked(), speculation=ALWAYS), 60)
    assert_same(found, expected)
    assert executor.counts["with drafts"]


@pytest.mark.parametrize("kind", CONFIGS)
async def test_drafts_of_a_model(kind: str) -> None:
    """Which the host has not seen; under grammars, too."""
    model, requests = model_of(kind), longer(requests_of(3, 9))
    expected = await without(model, bound(requests))
    executor = make_model(with_net(other), LIMITS, kind=Seeing, device=FakeDevice(2, 0.3), model=model)
    found = await asyncio.wait_for(answers_of(executor, bound(requests), speculation=MODEL), 60)
    assert_same(found, expected)
    assert executor.counts["seen"] > 20 and executor.counts["made"] > executor.counts["seen"]


async def test_drafts_of_the_layer_that_such_a_checkpoint_brings(tmp_path: Path) -> None:
    theirs, parts = mtp.write(tmp_path, "qwen")
    requests = apart(longer(requests_of(1)))
    limits = dataclasses.replace(WITHOUT, vocab_size=mtp.VOCAB)
    answers = await serve(make_executor(limits, model=read_target(tmp_path)), requests)
    model = read_target(tmp_path)
    assert isinstance(model, Decoder)
    with native.disabled():
        head = load_mtp(tmp_path, model, torch.float32, 64)
    drafting = dataclasses.replace(limits, max_draft_tokens=4)
    executor = make_model(with_net(lambda: HeadNet(head)), drafting, model=model, device=FakeDevice(1, 0.3))
    assert await asyncio.wait_for(serve(executor, requests, speculation=MTP), 60) == answers
    assert len(executor.said) > 10
    for text, said in executor.said[::3]:
        with torch.inference_mode():
            assert said == mtp.expected_drafts("qwen", theirs, parts, text, len(said))


async def test_rows_with_adapters(tmp_path: Path) -> None:
    answers: list[list[list[int]]] = []
    for speculation in (NO_DRAFTS, ALWAYS):
        executor: Any = make_executor(WITHOUT, model=a_model("states"))  # which takes the model from the one before it
        proposer = Telling([], 0.3)
        if answers:
            executor = make(proposer, LIMITS, device=FakeDevice(3, 0.3), model=a_model("states"))
        folder = tmp_path / str(len(answers))
        requests = longer(with_adapters(adapters_of("states", executor, folder), seed=2))
        if answers:
            proposer._answers = Telling(list(zip(requests, answers[0], strict=True)), 0.3)._answers
        answers.append(await asyncio.wait_for(serve(executor, requests, speculation=speculation), 60))
    assert answers[1] == answers[0]
    assert executor.counts["with drafts"]


@pytest.mark.parametrize(("kind", "attention"), [("delta", "xqa"), ("mamba", "wrapper"), ("convolution", "wrapper")])
async def test_everything_is_ordered(kind: str, attention: str) -> None:
    device = OrderedDevice(1)
    model, requests = model_of(kind), penalised(requests_of(1, 8))
    expected = await without(model, requests)
    answers = [(request, delta.token_ids) for request, delta in zip(requests, expected, strict=True)]
    executor = make(Telling(answers, 0.3), LIMITS, device=device, attention=attention, model=model)
    read_results(executor, device)
    found = await asyncio.wait_for(answers_of(executor, requests, speculation=ALWAYS), 60)
    assert_same(found, expected)
    assert not device.found and executor.counts["with drafts"]


# ---- failures


@pytest.mark.parametrize("kind", CONFIGS)
async def test_failed_steps_are_computed_again(kind: str) -> None:
    model, requests = model_of(kind), longer(requests_of(2))
    executor = make(Telling(told(model, requests), 0.3), LIMITS, device=FakeDevice(2, 0.3), model=model)
    fail_steps(executor, frozenset({5, 9}))
    tokens = await asyncio.wait_for(serve(executor, requests, speculation=ALWAYS), 60)
    assert tokens == [expected_tokens(model, request) for request in requests]


@pytest.mark.parametrize("method", ["_launch_decode", "_launch_mixed", "_draw_open"])
async def test_a_step_that_fails_at_any_launch_spoils_no_token(method: str) -> None:
    model, requests = model_of("delta"), shorter(penalised(requests_of(4, 6)))
    expected = await without(model, requests)
    answers = [(request, delta.token_ids) for request, delta in zip(requests, expected, strict=True)]
    for number in range(1, 40):
        device = FakeDevice(number, (0.0, 0.4)[number % 2])
        executor = make(Telling(answers, 0.2), LIMITS, device=device, model=model)
        failing = Failing(executor, method, number)
        found = await asyncio.wait_for(answers_of(executor, requests, speculation=ALWAYS), 60)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.token_ids == theirs.token_ids[: len(ours.token_ids)], f"launch {number}"
        if not failing.failed:
            assert_same(found, expected)
            return
    pytest.fail("it never came through")


async def test_a_step_that_fails_before_it_is_laid_out_leaves_its_states_behind() -> None:
    """The cache counts on what it has saved."""
    model, requests = model_of("delta"), repeating(5, 8)
    executor = make(make_proposer(ALWAYS), LIMITS, device=FakeDevice(2, 0.3), model=model)
    lay_out, failed = executor._with_drafts, 0

    def failing(given: ForwardInput, handle: Any) -> ForwardInput:
        nonlocal failed
        if given.num_saves and failed < 3:
            failed += 1
            raise RuntimeError("no idea")
        return lay_out(given, handle)

    executor._with_drafts = failing
    again = [dataclasses.replace(each, request_id=f"{each.request_id}-again") for each in requests]
    tokens = await asyncio.wait_for(serve(executor, [*requests, *again], speculation=ALWAYS), 60)
    assert tokens == 2 * [expected_tokens(model, request) for request in requests]
    assert failed == 3


# ---- mistakes


class Rejecting(States):
    """Right drafts leave nothing behind."""

    def accept(self, drawn: Tensor) -> None:
        super().accept(torch.full_like(drawn, -7))


class Trusting(States):
    """Wrong drafts count, too."""

    def accept(self, drawn: Tensor) -> None:
        device = self.plan.device
        if device is not None and device.drafts is not None:
            drawn = torch.cat((device.drafts[1:], drawn[:1]))
        super().accept(drawn)


class Unheld(States):
    """Drafts are rows of no sequence."""

    def expect(self, plan: StatePlan) -> None:
        device = plan.device
        if device is not None and plan.num_decode_rows == len(device.slots):
            plan = StatePlan.of_decodes(device.slots)
        super().expect(plan)


MUTANTS: list[Callable[..., States]] = [Rejecting, Trusting, Unheld]


@pytest.mark.parametrize("kind", MUTANTS)
@pytest.mark.filterwarnings("ignore")
async def test_mutant_is_caught(kind: Callable[..., States], monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("delta")
    for seed in range(3):
        requests = longer(requests_of(seed))
        with monkeypatch.context() as patched:
            patched.setattr("engine.executor.cuda_state.States", kind)
            executor: CUDAExecutor = make(
                Telling(told(model, requests), 0.3), LIMITS, device=FakeDevice(seed, 0.5), model=model
            )
        try:
            tokens = await asyncio.wait_for(serve(executor, requests, speculation=ALWAYS), 30)
            assert tokens == [expected_tokens(model, request) for request in requests]
        except Exception:
            return
    pytest.fail("nothing noticed")

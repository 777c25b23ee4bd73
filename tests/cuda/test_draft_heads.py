"""Heads on the fake device, that go on from the target's hidden states: their drafts are those of the formulas."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.executor.cuda_drafter import BEHIND, DeviceDrafter
from engine.forward import ForwardInput
from engine.models.loading.load import load_model
from engine.models.offload import _storages as storages_of
from engine.models.parts.decoder import CausalLM, Decoder
from engine.models.registry import read_spec
from engine.ops import native
from engine.request import Request
from engine.speculation.base import Text
from engine.speculation.eagle3 import load_eagle3
from engine.speculation.mtp import check_mtp, load_mtp
from engine.speculation.nets import HeadNet, Net
from tests.cuda.fake_device import FakeDevice
from tests.cuda.ordered_device import OrderedDevice
from tests.cuda.support import (
    SMALL,
    TINY,
    DenseAttention,
    expected_tokens,
    fail_steps,
    make_executor,
    one_thread,
    requests_of,
    serve,
    tiny_model,
)
from tests.cuda.test_draft_models import MODEL, Counting, assert_ended_by, longer, make, with_net
from tests.cuda.test_failures import Failing
from tests.cuda.test_failures import asked as with_extras
from tests.cuda.test_order import read_results
from tests.speculation import test_eagle3 as eagle3
from tests.speculation import test_mtp as mtp

CONFIG = json.dumps({**TINY, "vocab_size": eagle3.VOCAB, "hidden_size": eagle3.WIDTH, "num_hidden_layers": 3})
MTP = dataclasses.replace(MODEL, method="mtp")
EAGLE = dataclasses.replace(MODEL, method="eagle3")
LIMITS = dataclasses.replace(SMALL, vocab_size=eagle3.VOCAB, max_draft_tokens=4)
WITHOUT = dataclasses.replace(LIMITS, max_draft_tokens=0)


def target() -> CausalLM:
    """One that no reference is computed with."""
    return tiny_model.__wrapped__(CONFIG)


def head_of(model: CausalLM, directory: Path) -> Callable[[], Net]:
    assert isinstance(model, Decoder)
    with native.disabled():
        head = load_eagle3(directory, model, torch.float32, 96)
    return lambda: HeadNet(head)


def make_eagle(directory: Path, attention: str = "torch", context: int = 64, **options: Any) -> Any:
    model = options.pop("model", None) or target()
    drafts = with_net(head_of(model, directory), attention, context)
    return make(drafts, LIMITS, attention=attention, model=model, **options)


@functools.cache
def aux_of(text: tuple[int, ...]) -> list[Tensor]:
    """What the target's layers read, of a whole text."""
    model = tiny_model(CONFIG)
    assert isinstance(model, Decoder)
    model.aux_layers = tuple(eagle3.AUX)
    with torch.inference_mode(), native.disabled(), one_thread():
        model.forward(torch.tensor(text), torch.arange(len(text)), DenseAttention(model, len(text)))
    return list(model.aux)


def assert_said(executor: Counting, tensors: dict[str, Tensor], share: float = 1.0) -> None:
    """Drafts are the formula's. share: of texts, where some were found in the cache behind another's next token."""
    assert len(executor.said) > 10
    right = []
    for text, drafts in executor.said:
        with torch.inference_mode():
            expected = eagle3.expected_drafts(
                tensors, aux_of(tuple(text[:-1])), text, len(drafts), norm_before_residual=False
            )
        right.append(drafts == expected)
    assert np.mean(right) >= share


def apart(requests: list[Request]) -> list[Request]:
    """No two of them begin alike."""
    return [
        dataclasses.replace(each, prompt_token_ids=[101 + number, *each.prompt_token_ids])
        for number, each in enumerate(requests)
    ]


@pytest.mark.parametrize(
    ("attention", "mode", "seed", "overlap"),
    [
        ("torch", "lazy", 0, True),
        ("xqa", "start", 1, True),
        ("wrapper", "off", 2, True),
        ("xqa", "lazy", 2, False),
    ],
)
async def test_drafts_are_those_of_the_formulas(
    attention: str, mode: str, seed: int, overlap: bool, tmp_path: Path
) -> None:
    _, tensors = eagle3.write_head(tmp_path, "plain", norm_before_residual=False)
    requests = apart(longer(requests_of(seed)))
    device = FakeDevice(seed, (0.0, 0.3, 0.9)[seed])
    executor = make_eagle(tmp_path, attention, device=device, cuda_graph=mode)
    if mode == "start":
        executor.capture_at_start()
    tokens = await serve(executor, requests, speculation=EAGLE, overlap=overlap)
    assert tokens == [expected_tokens(tiny_model(CONFIG), request) for request in requests]
    assert executor.counts["beside prompts"]
    assert (executor._drafter.graphs.num_replays > 0) == (mode != "off")
    assert_said(executor, tensors)


def write_coin(directory: Path) -> dict[str, Tensor]:
    """A head that says one of two tokens."""
    _, tensors = eagle3.write_head(directory, "plain", norm_before_residual=False)
    ids = torch.arange(eagle3.DRAFT_VOCAB)
    tensors["d2t"] = 10 + ids % 2 - ids
    save_file(tensors, directory / "model.safetensors")
    return tensors


def of_two_tokens(seed: int) -> list[Request]:
    return apart(longer(requests_of(seed), allowed_token_ids=(10, 11), temperature=1.5))


@pytest.mark.parametrize(("attention", "overlap"), [("torch", True), ("xqa", True), ("wrapper", False)])
async def test_drafts_behind_drafts_that_came_true(attention: str, overlap: bool, tmp_path: Path) -> None:
    """What the head read of them by its own hidden states it reads once more by the target's."""
    tensors = write_coin(tmp_path)
    requests = of_two_tokens(1)
    answers = await serve(make_executor(WITHOUT, model=target()), requests)
    executor = make_eagle(tmp_path, attention, device=FakeDevice(1, 0.3))
    assert await serve(executor, requests, speculation=EAGLE, overlap=overlap) == answers
    assert executor.counts["drafted"] > executor.counts["accepted"] > 20
    assert_said(executor, tensors)


async def test_texts_found_in_the_cache(tmp_path: Path) -> None:
    """What is kept of a position depends on the next token, which was another's at the end of what was found."""
    _, tensors = eagle3.write_head(tmp_path, "plain", norm_before_residual=False)
    requests = longer(requests_of(2))
    again = [dataclasses.replace(each, request_id=f"{each.request_id}-again") for each in requests]
    executor = make_eagle(tmp_path, device=FakeDevice(2, 0.3))
    tokens = await serve(executor, [*requests, *again], speculation=EAGLE)
    assert tokens == 2 * [expected_tokens(tiny_model(CONFIG), request) for request in requests]
    assert_said(executor, tensors, 0.6)


async def test_tokens_that_nobody_drafts_for_are_read_behind(tmp_path: Path) -> None:
    """Before their hidden states are written over."""
    _, tensors = eagle3.write_head(tmp_path, "plain", norm_before_residual=False)
    requests = apart(longer(requests_of(3, 4)))
    requests = [dataclasses.replace(r, sampling=dataclasses.replace(r.sampling, max_tokens=36)) for r in requests]
    executor = make_eagle(tmp_path, device=FakeDevice(3, 0.3))
    speculator, told = executor._speculator, 0
    late = speculator._draft_late

    def seldom(*given: Any) -> None:
        nonlocal told
        told += 1
        if told % 33 > 28:
            late(*given)

    speculator._draft_late = seldom
    tokens = await serve(executor, requests, speculation=EAGLE)
    assert tokens == [expected_tokens(tiny_model(CONFIG), request) for request in requests]
    assert executor.counts["readings alone"]
    assert_said(executor, tensors)


def test_a_prompt_that_the_step_in_flight_reads_is_not_read_once_more(tmp_path: Path) -> None:
    """Its hidden states are not kept: what was right would be written over."""
    eagle3.write_head(tmp_path, "plain", norm_before_residual=False)
    executor = make_eagle(tmp_path)
    drafter, staging = executor._drafter, executor.staging[0]
    step = ForwardInput(0, staging, 1, 0, 1, 0, 0, num_speculating_rows=1)
    staging.row_slot[0], staging.row_len[0] = 1, 1
    drafter.start(1, Text(list(range(5, 25)), ""))
    # Its second chunk is in flight.
    drafter._slots[1].done, drafter._read_to[1] = 10, 20
    drafter.begin(dataclasses.replace(step), [])
    assert drafter.lay_out(step, step) is None
    drafter._slots[1].done = 10 + 10 - BEHIND  # as of a text that grew since
    drafter._read_to[1] = 10
    drafter.begin(step, [])
    assert [index for _, index, _, _ in drafter.lay_out(step, step).rows] == list(range(20 - BEHIND, 20))
    executor.close()


@pytest.mark.parametrize("extras", [True, False])
async def test_everything_is_ordered(extras: bool, tmp_path: Path) -> None:
    eagle3.write_head(tmp_path, "plain")
    device = OrderedDevice(1)
    requests = with_extras(extras)
    executor = make_eagle(tmp_path, "xqa", device=device)
    read_results(executor, device)
    await serve(executor, requests, speculation=EAGLE)
    assert not device.found
    assert executor.counts["with drafts"]


@pytest.mark.parametrize("attention", ["torch", "xqa", "wrapper"])
async def test_rows_without_numbers(attention: str, tmp_path: Path) -> None:
    """Their hidden states are no numbers, and neither would be what the head keeps of them."""
    eagle3.write_head(tmp_path, "plain")
    requests = longer(requests_of(1))
    answers = [expected_tokens(tiny_model(CONFIG), request) for request in requests]
    prompts = {token for request in requests for token in request.prompt_token_ids}
    token = next(int(each) for each in np.array(answers)[:, 3:10].ravel() if int(each) not in prompts)
    model: Any = target()
    model._embedding._weight[token] = torch.nan
    executor = make_eagle(tmp_path, attention, device=FakeDevice(1, 0.3), model=model)
    tokens = await asyncio.wait_for(serve(executor, requests, speculation=EAGLE), 60)
    assert_ended_by(token, executor, tokens, answers)
    assert executor._drafter._ring.isfinite().all()


@pytest.mark.parametrize(
    ("method", "attention"), [("_launch_mixed", "xqa"), ("_launch_decode", "torch"), ("_launch_drafts", "xqa")]
)
async def test_a_step_that_fails_at_any_launch_spoils_no_token(method: str, attention: str, tmp_path: Path) -> None:
    eagle3.write_head(tmp_path, "plain")
    requests = with_extras(True)
    answers = await serve(make_executor(WITHOUT, attention=attention, model=target()), requests)
    number = 1
    while True:
        device = FakeDevice(number, (0.0, 0.4)[number % 2])
        executor = make_eagle(tmp_path, attention, device=device)
        failing = Failing(executor, method, number)
        tokens = await asyncio.wait_for(serve(executor, requests, speculation=EAGLE), 60)
        for ours, theirs in zip(tokens, answers, strict=True):
            assert ours == theirs[: len(ours)], f"launch {number}: a token of a failed step reached a client"
        if not failing.failed:
            assert tokens == answers
            break
        number += 1
    assert number > 2 and executor.counts["made"]


async def test_a_failed_step_is_computed_again(tmp_path: Path) -> None:
    eagle3.write_head(tmp_path, "plain")
    requests = longer(requests_of(1))
    executor = make_eagle(tmp_path, device=FakeDevice(1, 0.3))
    fail_steps(executor, frozenset({5, 11}))
    tokens = await serve(executor, requests, speculation=EAGLE)
    assert tokens == [expected_tokens(tiny_model(CONFIG), request) for request in requests]
    assert executor.counts["made"]


@pytest.mark.parametrize("level", [1, 2])
async def test_sleep_and_other_weights(level: int, tmp_path: Path) -> None:
    """The head goes on from whatever model there is."""
    _, tensors = eagle3.write_head(tmp_path, "plain", norm_before_residual=False)
    requests = apart(longer(requests_of(4)))
    answers = [expected_tokens(tiny_model(CONFIG), request) for request in requests]
    executor = make_eagle(tmp_path, device=FakeDevice(4, 0.3), load=lambda directory: target())
    executor.close, close = lambda: None, executor.close
    for turn in range(3):
        again = [
            dataclasses.replace(
                r, request_id=f"{r.request_id}-{turn}", prompt_token_ids=[120 + turn, *r.prompt_token_ids]
            )
            for r in requests
        ]
        answers = [expected_tokens(tiny_model(CONFIG), request) for request in again]
        assert await serve(executor, again, speculation=EAGLE) == answers
        if turn == 0:
            executor.sleep(level)
            assert not any(storage.nbytes() for storage in storages_of(executor._drafter.net.weights))
            executor.wake_up()
            assert executor.model.aux_layers == tuple(eagle3.AUX)
        elif turn == 1:
            executor.load_weights(tmp_path)
        executor.num_steps = 0
    assert_said(executor, tensors)
    close()


# ---- layers that checkpoints bring


def read_target(directory: Path) -> CausalLM:
    with native.disabled():
        return load_model(
            read_spec(directory), directory, dtype=torch.float32, device=torch.device("cpu"), max_model_len=64
        )


@pytest.mark.parametrize(
    ("family", "copies", "attention", "drafting"),
    [
        ("deepseek", "equal", "torch", "torch"),
        ("glm", "own", "wrapper", "wrapper"),
        ("mimo", "", "wrapper", "wrapper"),
        ("glm", "equal", "torch", "torch"),
    ],
)
async def test_drafts_of_such_layers(
    family: str, copies: str, attention: str, drafting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without experts, which only have kernels on a GPU."""
    if family != "mimo":
        monkeypatch.setitem(mtp.FAMILIES[family][1], "first_k_dense_replace", mtp.LAYERS + 1)
    theirs, parts = mtp.write(tmp_path, family, copies=copies)
    requests = apart(longer(requests_of(1)))
    answers = await serve(make_executor(WITHOUT, model=read_target(tmp_path)), requests)
    model = read_target(tmp_path)
    assert isinstance(model, Decoder)
    check_mtp(model.config, tmp_path)
    with native.disabled():
        head = load_mtp(tmp_path, model, torch.float32, 64)
    drafts = with_net(lambda: HeadNet(head), drafting)
    executor = make(drafts, LIMITS, attention=attention, model=model, device=FakeDevice(1, 0.3))
    assert await serve(executor, requests, speculation=MTP) == answers
    assert len(executor.said) > 10
    for text, said in executor.said[::3]:
        with torch.inference_mode():
            assert said == mtp.expected_drafts(family, theirs, parts, text, len(said))


# ---- mistakes


class OneOff(DeviceDrafter):
    """What stands before a prompt's token is taken from where the token is."""

    def keep_step(
        self, hidden: Tensor, aux: list[Tensor], slots: Tensor, starts: Tensor, indptr: Tensor, before: Tensor
    ) -> None:
        super().keep_step(hidden, aux, slots, starts, indptr, before)
        before.copy_(self.net.fuse(hidden, aux))


class Small(DeviceDrafter):
    """What is kept of a text is written over too soon."""

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self._around = 2


class FromItself(DeviceDrafter):
    """Where drafts came true it holds what it read behind them, from its own hidden states, to be the target's."""

    def propose(self, slots: Any, most: Any) -> list[list[int]]:
        found = super().propose(slots, most)
        for slot, drafts in zip(slots, found, strict=True):
            if drafts:
                self._slots[slot].fed = len(drafts) - 1
        return found


class NeverKeeping(DeviceDrafter):
    """Decode steps keep no hidden states."""

    def keep(self, *given: Any) -> None:
        pass


@pytest.mark.parametrize("drafter", [OneOff, Small, FromItself, NeverKeeping])
@pytest.mark.filterwarnings("ignore")
async def test_mutant_is_caught(drafter: type[DeviceDrafter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By drafts that are not the formula's."""
    tensors = write_coin(tmp_path)
    monkeypatch.setattr("engine.executor.cuda_drafts.DeviceDrafter", drafter)
    for seed in range(3):
        requests = of_two_tokens(seed)
        executor = make_eagle(tmp_path, device=FakeDevice(seed, 0.3))
        try:
            await asyncio.wait_for(serve(executor, requests, speculation=EAGLE), 30)
            assert_said(executor, tensors)
        except Exception:
            return
    pytest.fail("nothing noticed")

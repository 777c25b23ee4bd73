"""Draft models on the fake device: drafts that no host sees before they are tried; the text is that of decoding."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from engine.executor.cuda_buffers import CudaHandle
from engine.executor.cuda_drafter import Drafts, Reading
from engine.forward import ForwardInput, Limits
from engine.groups import MemoryGroup, plan_groups
from engine.models.parts.decoder import CausalLM
from engine.ops.attention.device import DeviceAttention
from engine.request import Request, SamplingParams
from engine.speculation.base import Text
from engine.speculation.nets import ModelNet, Net
from engine.speculation.paged import full_group
from engine.speculation.prediction import Prediction
from engine.speculation.vocabulary import VocabularyMap
from tests.cuda.fake_device import FakeDevice
from tests.cuda.ordered_device import OrderedDevice
from tests.cuda.support import (
    ALWAYS,
    GROUPED,
    SMALL,
    TINY,
    expected_tokens,
    make_attention,
    make_executor,
    reference_next,
    requests_of,
    serve,
    tiny_model,
)
from tests.cuda.test_drafts import DRAFTS, Watched
from tests.cuda.test_order import asked, read_results

MODEL = dataclasses.replace(ALWAYS, method="draft_model")
OTHER = {**TINY, "hidden_size": 24, "num_hidden_layers": 1, "architectures": ["Qwen3ForCausalLM"]}


class Counting(Watched):
    """counts, too: drafts that a model made, those that were right, and readings by what they were for. said: texts,
    and what was drafted behind them."""

    said: list[tuple[list[int], list[int]]]

    def _with_drafts(self, given: ForwardInput, handle: CudaHandle) -> ForwardInput:
        flat = super()._with_drafts(given, handle)
        if isinstance(handle.reading, Reading):
            self.counts["readings"] += 1
            self.counts["readings alone"] += not handle.reading.made
            self.counts["made"] += len(handle.reading.spots)
        return flat

    def _follow(self, handle: CudaHandle, output: Any) -> None:
        if handle.told:
            assert self._speculator is not None
            places = zip(handle.reading.spots, handle.told.values(), strict=True)
            for slot, drafts in itertools.groupby(places, key=lambda place: place[0][1]):
                self.said.append((list(self._speculator._texts[slot].tokens), [token for _, token in drafts]))
        super()._follow(handle, output)
        if output.accepted is not None:
            self.counts["drafted"] += int(output.accepted.num_drafted.sum())
            self.counts["accepted"] += int(output.accepted.counts.sum()) - len(output.accepted.counts)


def with_net(
    make_net: Callable[[], Net], attention: str = "torch", context: int = 64, probabilistic: bool = False
) -> Callable[[Limits, FakeDevice], Drafts]:
    """Of `make_executor`."""

    def drafts(limits: Limits, device: FakeDevice) -> Drafts:
        net, group = make_net(), full_group(limits.groups)
        assert group is not None
        alone = dataclasses.replace(limits, groups=(MemoryGroup(),))
        paged = make_attention(attention, net, alone, device)  # type: ignore[arg-type]

        def by_torch() -> DeviceAttention:
            return make_attention("torch", net, alone, device)  # type: ignore[arg-type]

        return Drafts(net, paged, by_torch, group, context, probabilistic)

    return drafts


def itself() -> Net:
    return ModelNet(tiny_model(), None, torch.device("cpu"))


def other() -> Net:
    return ModelNet(tiny_model(json.dumps(OTHER)), None, torch.device("cpu"))


def make(drafts: Callable[[Limits, FakeDevice], Drafts], limits: Limits = DRAFTS, **options: Any) -> Any:
    executor = make_executor(
        limits, kind=options.pop("kind", Counting), proposer=Prediction(), drafts=drafts, **options
    )
    if isinstance(executor, Watched):
        executor.counts = Counter()
    if isinstance(executor, Counting):
        executor.said = []
    return executor


def assert_said(executor: Counting, model: CausalLM) -> None:
    """What was drafted is what the model says, computed anew over whole texts."""
    greedy = SamplingParams(temperature=0.0)
    assert len(executor.said) > 10
    for text, drafts in executor.said:
        tokens = list(text)
        for draft in drafts:
            assert draft == reference_next(model, tokens, greedy)
            tokens.append(draft)


def assert_ended_by(token: int, executor: Counting, tokens: list[list[int]], answers: list[list[int]]) -> None:
    """Who says a token that is none to the model ends there, no other answer changes, and no cache keeps NaN."""
    for ours, theirs in zip(tokens, answers, strict=True):
        if token in theirs[:-1]:
            assert ours == theirs[: len(ours)] and len(ours) <= theirs.index(token) + 1
        else:
            assert ours == theirs
    assert any(token in answer[:-1] for answer in answers) and executor.counts["made"]
    for layer in (executor.attention, executor._drafter.attention):
        assert all(pool.isfinite().all() for pool in [*layer.k_pools.values(), *layer.v_pools.values()])


def longer(requests: list[Request], **changes: Any) -> list[Request]:
    return [
        dataclasses.replace(each, sampling=dataclasses.replace(each.sampling, max_tokens=14, **changes))
        for each in requests
    ]


@pytest.mark.parametrize(
    ("attention", "mode", "seed", "overlap"),
    [
        ("torch", "lazy", 0, True),
        ("xqa", "lazy", 1, False),
        ("wrapper", "lazy", 2, True),
        ("torch", "off", 1, False),
        ("xqa", "start", 2, True),
    ],
)
async def test_a_model_that_drafts_for_itself_is_always_right(
    attention: str, mode: str, seed: int, overlap: bool
) -> None:
    """Where all that it has read is right: prompts, its own drafts, and what it did not draft."""
    requests = longer(requests_of(seed), temperature=0.0)
    device = FakeDevice(seed, (0.0, 0.3, 0.9)[seed])
    executor = make(with_net(itself, attention), device=device, attention=attention, cuda_graph=mode)
    if mode == "start":
        executor.capture_at_start()
    tokens = await serve(executor, requests, speculation=MODEL, overlap=overlap)
    assert tokens == [expected_tokens(tiny_model(), request) for request in requests]
    counts = executor.counts
    assert counts["accepted"] == counts["drafted"] == counts["made"] > 40
    assert counts["beside prompts"]
    assert (executor._drafter.graphs.num_replays > 0) == (mode != "off")


@pytest.mark.parametrize(
    ("attention", "seed", "overlap"), [("torch", 0, True), ("xqa", 1, True), ("wrapper", 2, False)]
)
async def test_tokens_are_the_references(attention: str, seed: int, overlap: bool) -> None:
    """Of a model that is mostly wrong, and knows but a part of the context."""
    requests = longer(requests_of(seed))
    device = FakeDevice(seed, (0.0, 0.3, 0.9)[seed])
    executor = make(with_net(other, attention, context=30), device=device, attention=attention)
    tokens = await serve(executor, requests, speculation=MODEL, overlap=overlap)
    assert tokens == [expected_tokens(tiny_model(), request) for request in requests]
    assert executor.counts["made"] > executor.counts["accepted"]
    assert_said(executor, tiny_model(json.dumps(OTHER)))


async def test_tokens_that_nobody_drafts_for_are_read_behind() -> None:
    """So many that no step reads all that was left; what is drafted then is right."""
    requests = longer(requests_of(3, 4), temperature=0.0)
    requests = [dataclasses.replace(r, sampling=dataclasses.replace(r.sampling, max_tokens=30)) for r in requests]
    executor = make(with_net(itself), device=FakeDevice(3, 0.3))
    speculator, told = executor._speculator, 0
    late = speculator._draft_late

    def seldom(step: ForwardInput, room: int | None) -> None:
        nonlocal told
        told += 1
        if told % 21 > 18:
            late(step, room)

    speculator._draft_late = seldom
    tokens = await serve(executor, requests, speculation=MODEL)
    assert tokens == [expected_tokens(tiny_model(), request) for request in requests]
    counts = executor.counts
    assert counts["readings alone"] and counts["accepted"] == counts["drafted"] > 0


@pytest.mark.parametrize("probabilistic", [True, False])
async def test_drawn_drafts_have_the_noise_of_the_target(probabilistic: bool) -> None:
    """So the model itself is right even where it is hot."""
    requests = longer(requests_of(5), temperature=1.5)
    executor = make(with_net(itself, probabilistic=probabilistic), device=FakeDevice(1, 0.3))
    tokens = await serve(executor, requests, speculation=MODEL)
    assert tokens == [expected_tokens(tiny_model(), request) for request in requests]
    assert (executor.counts["accepted"] == executor.counts["drafted"]) == probabilistic


class Shuffled:
    """The tiny model, with other ids."""

    def __init__(self, order: np.ndarray) -> None:
        self.model, self.order = tiny_model(), torch.from_numpy(order)
        self.attention_spec, self.config = self.model.attention_spec, self.model.config

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, attention: Any) -> torch.Tensor:
        return self.model.forward(self.order[ids.long()].int(), positions, attention)

    def raw_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.model.raw_logits(hidden).index_select(1, self.order)


@pytest.mark.parametrize("lacking", [0, 20])
async def test_another_vocabulary(lacking: int) -> None:
    order = np.random.default_rng(0).permutation(101)
    back = np.argsort(order).astype(np.int32)
    to_target = order.astype(np.int32)
    # Tokens that the target has not: a draft of them is wrong, or happens to be right.
    to_target[:lacking] = -1
    vocabulary = VocabularyMap(to_target, back)

    def net() -> Net:
        return ModelNet(Shuffled(order), vocabulary, torch.device("cpu"))  # type: ignore[arg-type]

    requests = longer(requests_of(6), temperature=0.0)
    executor = make(with_net(net), device=FakeDevice(1, 0.3))
    tokens = await serve(executor, requests, speculation=MODEL)
    assert tokens == [expected_tokens(tiny_model(), request) for request in requests]
    counts = executor.counts
    assert counts["drafted"] > 20 and (counts["accepted"] == counts["drafted"]) == (not lacking)


async def test_windows_and_few_pages() -> None:
    """Sequences are retracted, and the draft model's pages are those of the group that keeps all."""
    model = tiny_model(json.dumps(GROUPED))
    groups = plan_groups(model.config.windows, SMALL.max_model_len)
    limits = dataclasses.replace(DRAFTS, num_pages=44, groups=groups)
    requests = longer(requests_of(11))

    def net() -> Net:
        return ModelNet(model if model.attention_spec.common else tiny_model(), None, torch.device("cpu"))

    executor = make(with_net(net), limits, device=FakeDevice(3, 0.3), attention="xqa", model=model)
    tokens = await serve(executor, requests, speculation=MODEL)
    assert tokens == [expected_tokens(model, request) for request in requests]
    assert executor.counts["made"]


@pytest.mark.parametrize("attention", ["xqa", "wrapper"])
async def test_everything_is_ordered(attention: str) -> None:
    device = OrderedDevice(1)
    requests = asked(1, True)
    executor = make(with_net(other, attention), device=device, attention=attention)
    read_results(executor, device)
    await serve(executor, requests, speculation=MODEL)
    assert not device.found
    assert executor.counts["with drafts"]


def test_a_slot_that_is_passed_on_is_read_for_nobody() -> None:
    """Until the text of who has it now is known: the one before it would go to the other's pages."""
    executor = make(with_net(itself))
    drafter, staging = executor._drafter, executor.staging[0]
    drafter.start(1, Text(list(range(20)), ""))
    drafter._slots[1].done = 3
    staging.row_slot[0], staging.row_len[0], staging.sampling_slot[0] = 1, 1, 1
    step = ForwardInput(0, staging, 1, 1, 1, 0, 0)
    drafter.begin(step, [])
    reading = drafter.lay_out(step, step)
    assert [row[:3] for row in reading.rows] == [(1, index, index) for index in range(3, 20)]
    drafter._slots[1].done = 3
    drafter.begin(dataclasses.replace(step, num_sampling_diffs=1), [])
    assert drafter.lay_out(step, step) is None
    executor.close()


async def test_rejected_drafts_never_enter_the_tree() -> None:
    """The same texts once more find pages, and go on as before."""
    requests = longer(requests_of(2))
    again = [dataclasses.replace(each, request_id=f"{each.request_id}-again") for each in requests]
    executor = make(with_net(other), device=FakeDevice(2, 0.3))
    tokens = await serve(executor, [*requests, *again], speculation=MODEL)
    expected = [expected_tokens(tiny_model(), request) for request in requests]
    assert tokens == expected * 2
    assert executor.counts["made"] > executor.counts["accepted"]

"""Drafts on the fake device: the tokens of decoding, whatever was drafted, by the kernels and graphs of decoding."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
from collections import Counter
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from engine.config import CacheOptions
from engine.executor import cuda_decode, cuda_mixed
from engine.executor.cuda import CUDAExecutor
from engine.executor.cuda_buffers import CudaHandle, Side, widened
from engine.executor.cuda_device import Graph
from engine.executor.cuda_graph import GraphCache, GraphKey
from engine.executor.cuda_start import build_cuda_executor
from engine.forward import ForwardInput, Limits
from engine.groups import plan_groups
from engine.models.parts.decoder import CausalLM
from engine.ops.sampling.device import accept
from engine.request import Request
from engine.speculation.base import Proposer
from engine.speculation.paged import LateProposer
from engine.speculation.registry import make_proposer
from tests.cuda.fake_device import FakeDevice
from tests.cuda.ordered_device import OrderedDevice
from tests.cuda.support import (
    ALWAYS,
    GROUPED,
    SMALL,
    TINY,
    expected_tokens,
    fail_steps,
    make_executor,
    requests_of,
    serve,
    tiny_model,
)
from tests.cuda.test_order import asked, read_results
from tests.executor.test_speculation import NEW, PROBES, VOCAB, Answer, Oracle, Script
from tests.speculation.guesses import Following

DRAFTS = dataclasses.replace(SMALL, max_draft_tokens=4)


class Knowing(Following):
    """Drafts what will come, each token wrong with a probability; sometimes nothing, if it hesitates."""

    def __init__(self, requests: list[Request], wrong: float, hesitates: bool = False) -> None:
        super().__init__()
        self._answers = {tuple(r.prompt_token_ids): expected_tokens(tiny_model(), r) for r in requests}
        self._wrong, self._hesitates = wrong, hesitates
        self._generator = np.random.default_rng(3)

    def draft(self, slot: int, most: int) -> list[int]:
        tokens = self._texts[slot].tokens
        if self._hesitates and self._generator.random() < 0.5:
            return []
        for prompt, answer in self._answers.items():
            done = len(tokens) - len(prompt)
            if done >= 0 and tokens == [*prompt, *answer[:done]]:
                noise = self._generator.integers(0, 101, most).tolist()
                wrong = (self._generator.random(most) < self._wrong).tolist()
                return [n if w else t for t, n, w in zip(answer[done : done + most], noise, wrong, strict=False)]
        return []


class Watched(CUDAExecutor):
    """counts: steps that were launched behind another, those with drafts, drafts, and steps that had to wait."""

    counts: Counter[str]

    def _with_drafts(self, given: ForwardInput, handle: CudaHandle) -> ForwardInput:
        flat = super()._with_drafts(given, handle)
        self.counts["launched behind another"] += self._in_flight > 1
        self.counts["rows"] = max(self.counts["rows"], flat.num_rows)
        if handle.drafted is not None:
            self.counts["drafts"] += handle.drafted.shift
            self.counts["with drafts"] += handle.drafted.shift > 0
            self.counts["beside prompts"] += handle.drafted.shift > 0 and flat.num_decode_rows < flat.num_rows
        return flat

    def _needs_tokens(self, given: ForwardInput) -> bool:
        needs = super()._needs_tokens(given)
        self.counts["waited"] += needs
        return needs


def make(proposer: Proposer, limits: Limits = DRAFTS, kind: type[CUDAExecutor] = Watched, **options: Any) -> Any:
    executor = make_executor(limits, kind=kind, proposer=proposer, **options)
    if isinstance(executor, Watched):
        executor.counts = Counter()
    return executor


def repeating(seed: int, count: int = 5) -> list[Request]:
    """Prompts that repeat themselves, so that there is something to look up, and answers that do so in the end."""
    return [
        dataclasses.replace(
            request,
            prompt_token_ids=(request.prompt_token_ids * 4)[:24],
            sampling=dataclasses.replace(request.sampling, max_tokens=26),
        )
        for request in requests_of(seed, count)
    ]


@pytest.mark.parametrize(
    ("attention", "wrong", "seed"),
    [("torch", 0.0, 0), ("torch", 0.4, 1), ("xqa", 0.4, 1), ("wrapper", 0.4, 1), ("xqa", 1.0, 2)],
)
async def test_tokens_are_the_references(attention: str, wrong: float, seed: int) -> None:
    requests = requests_of(seed)
    device = FakeDevice(seed, (0.0, 0.3, 0.9)[seed])
    executor = make(Knowing(requests, wrong, hesitates=seed == 1), device=device, attention=attention)
    tokens = await serve(executor, requests, speculation=ALWAYS)
    assert tokens == [expected_tokens(tiny_model(), request) for request in requests]
    assert executor.counts["with drafts"] and executor.counts["beside prompts"] and executor.counts["waited"]


@pytest.mark.parametrize(("method", "mode"), [("ngram", "lazy"), ("suffix", "start"), ("ngram", "off")])
async def test_what_is_looked_up_in_the_text(method: str, mode: str) -> None:
    requests = repeating(5)
    device = FakeDevice(5, 0.3)
    options = dataclasses.replace(ALWAYS, method=method)
    executor = make(make_proposer(options), device=device, cuda_graph=mode)
    if mode == "start":
        executor.capture_at_start()
    tokens = await serve(executor, requests, speculation=options)
    assert tokens == [expected_tokens(tiny_model(), request) for request in requests]
    assert executor.counts["drafts"]
    assert (device.counts["replay"] > 0) == (mode != "off")


async def test_steps_with_drafts_are_replayed() -> None:
    requests = [dataclasses.replace(r, prompt_token_ids=r.prompt_token_ids[:3]) for r in requests_of(1, 4)]
    requests = [
        dataclasses.replace(r, sampling=dataclasses.replace(r.sampling, max_tokens=40, top_k=0, top_p=1.0))
        for r in requests
    ]
    executor = make(Knowing(requests, 0.0))
    replayed: list[int] = []
    get = executor.graphs.get

    def noting(key: GraphKey) -> Graph | None:
        if (graph := get(key)) is not None:
            replayed.append(key.side)
        return graph

    executor.graphs.get = noting
    tokens = await serve(executor, requests, speculation=ALWAYS)
    assert tokens == [expected_tokens(tiny_model(), request) for request in requests]
    assert {2, 3} <= set(replayed)
    # Four rows of five tokens each: more than rows without drafts could be.
    assert executor.counts["rows"] == 20 > SMALL.max_num_seqs


async def test_text_that_gives_nothing_to_propose_makes_next_to_no_step_wait() -> None:
    """Of each request one at most: the first of its answer."""
    requests = requests_of(4)
    executor = make(Knowing([], 0.0))
    tokens = await serve(executor, requests, speculation=ALWAYS)
    assert tokens == [expected_tokens(tiny_model(), request) for request in requests]
    assert executor.counts["waited"] <= len(requests) and not executor.counts["drafts"]
    assert executor.counts["launched behind another"] > 5


@pytest.mark.parametrize("attention", ["xqa"])
async def test_windows_and_few_pages(attention: str) -> None:
    """Sequences are retracted, and rejected drafts stood in pages that are given back."""
    model = tiny_model(json.dumps(GROUPED))
    groups = plan_groups(model.config.windows, SMALL.max_model_len)
    limits = dataclasses.replace(DRAFTS, num_pages=44, groups=groups)
    requests = repeating(11)
    executor = make(make_proposer(ALWAYS), limits, device=FakeDevice(3, 0.3), attention=attention, model=model)
    tokens = await serve(executor, requests, speculation=ALWAYS)
    assert tokens == [expected_tokens(model, request) for request in requests]
    assert executor.counts["drafts"]


@pytest.mark.parametrize("seed", range(2))
async def test_a_failed_step_is_computed_again(seed: int) -> None:
    requests = requests_of(seed)
    executor = make(Knowing(requests, 0.3), device=FakeDevice(seed, 0.3))
    fail_steps(executor, frozenset({4 + seed}))
    tokens = await serve(executor, requests, speculation=ALWAYS)
    assert tokens == [expected_tokens(tiny_model(), request) for request in requests]


async def test_a_lost_device_ends_what_waits_for_tokens() -> None:
    requests = requests_of(1)
    device = FakeDevice(1)
    executor = make(Knowing(requests, 0.0), device=device)
    judge = executor._output_of

    def losing(handle: CudaHandle) -> Any:
        if executor._deferred is not None:
            executor._lose(RuntimeError("gone"))
        return judge(handle)

    executor._output_of = losing
    with pytest.raises(Exception, match="gone"):
        await serve(executor, requests, speculation=ALWAYS)


# ---- penalties, grammars, log-probabilities


@dataclasses.dataclass
class DeviceScript(Script):
    """On the fake device."""

    attention: str = "torch"
    seed: int = 0

    def make(self, limits: Limits, late: LateProposer | None) -> CUDAExecutor:
        device = FakeDevice(self.seed, (0.0, 0.3, 0.9)[self.seed % 3])
        return make_executor(limits, device=device, attention=self.attention, model=self.model, proposer=self.proposer)


@functools.cache
def model_of() -> CausalLM:
    return tiny_model(json.dumps({**TINY, "vocab_size": VOCAB}))


_plain: dict[int, Answer] = {}


async def plain() -> dict[int, Answer]:
    """What decoding says, each alone."""
    for index in range(len(PROBES)):
        if index not in _plain:
            _plain.update(await DeviceScript(model_of(), torch.float32).run([index]))
    return _plain


def assert_answers(found: dict[int, Answer], expected: dict[int, Answer]) -> None:
    """By probe: the tokens of decoding, and its figures up to their last places."""
    for index, answer in found.items():
        tokens, figures = answer.seen()
        assert tokens == expected[index].tokens[:NEW], PROBES[index]
        for ours, theirs in zip(figures, expected[index].seen()[1], strict=True):
            assert ours[0] == pytest.approx(theirs[0], abs=1e-4) and ours[1:3] == theirs[1:3]
            assert ours[3] == pytest.approx(theirs[3], abs=1e-4)


@pytest.mark.parametrize(
    ("attention", "wrong", "most", "depth"),
    [("torch", 0.0, 4, 2), ("xqa", 0.4, 8, 2), ("wrapper", 0.4, 3, 1), ("wrapper", 1.0, 5, 2)],
)
async def test_everything_that_may_be_asked_for(attention: str, wrong: float, most: int, depth: int) -> None:
    """Figures are those of a row that is computed with others, up to its last places."""
    expected = await plain()
    answers = {slot: expected[index].tokens for slot, index in enumerate(range(len(PROBES)), 1)}
    script = DeviceScript(
        model_of(), torch.float32, Oracle(answers, wrong), most, depth, attention=attention, seed=most
    )
    found = await script.run(list(range(len(PROBES))))
    assert_answers(found, expected)
    assert script.num_drafted > 20
    assert (script.num_accepted > 20) == (wrong < 1.0)


# ---- parts


def test_accept_finds_the_last_right_draft() -> None:
    """Against a loop over the sequences."""
    random = np.random.default_rng(1)
    for _ in range(50):
        begins, tokens, slots = [], [], []
        for slot in random.permutation(6)[: random.integers(1, 7)].tolist():
            begins.append((len(tokens), slot + 1))
            tokens += [-1, *random.integers(0, 3, random.integers(0, 5)).tolist()]
            slots += [slot + 1] * (len(tokens) - len(slots))
        drawn = random.integers(0, 3, len(tokens)).tolist()
        expected = [-7] * 8
        for row, slot in begins:
            while row + 1 < len(tokens) and tokens[row + 1] == drawn[row]:
                row += 1
            expected[slot] = drawn[row]
        last = torch.full((8,), -7, dtype=torch.int32)
        given = (torch.tensor(each, dtype=torch.int32) for each in (tokens, [*drawn, 5], [*slots, 0]))
        accept(*given, last)
        assert last.tolist()[1:] == expected[1:]


def test_rows_of_a_step_with_drafts() -> None:
    """Nine tokens for a sequence alone; 256 for many; never more than a step has room for."""
    limits = dataclasses.replace(SMALL, max_num_seqs=1, max_num_batched_tokens=512, max_draft_tokens=8)
    assert widened(limits).max_num_seqs == 9
    assert widened(dataclasses.replace(limits, max_num_seqs=64)).max_num_seqs == 256
    assert widened(dataclasses.replace(limits, max_num_seqs=300)).max_num_seqs == 300
    assert widened(dataclasses.replace(limits, max_num_seqs=64, max_num_batched_tokens=100)).max_num_seqs == 100
    assert widened(SMALL) == SMALL


def test_graphs_of_plain_steps_are_those_without_drafts() -> None:
    without, beside = (GraphCache(FakeDevice(), "start", 5, 10, most) for most in (None, 40))
    assert [key for key in beside.at_start() if key.side < 2] == list(without.at_start())
    assert {key.size for key in beside.at_start() if key.side > 1} == {1, 2, 4, 5, 8, 16, 24, 32, 40}
    assert [beside.key(rows, 1, 0, "plain").size for rows in (1, 3, 5)] == [1, 4, 5]


@pytest.mark.parametrize("mode", ["lazy", "start"])
async def test_start_makes_room_for_them(mode: str) -> None:
    """The hungriest step, graphs and buffers are those of steps with drafts; what is served then is the reference's."""
    rows: dict[str, str] = {}
    cache = CacheOptions(num_pages=40, page_size=4)
    executor = build_cuda_executor(
        tiny_model.__wrapped__(),  # its products may be changed
        FakeDevice(2, 0.3),  # type: ignore[arg-type]
        cache,
        dtype=torch.float32,
        max_num_seqs=4,
        max_num_batched_tokens=24,
        max_model_len=64,
        cuda_graph=mode,
        row=rows.__setitem__,
        speculation=ALWAYS,
    )
    assert executor.limits.max_draft_tokens == 4 and executor._sides[2].staging.limits.max_num_seqs == 20
    assert rows["steps with drafts"].startswith("up to 20 rows")
    requests = repeating(7, 4)
    assert await serve(executor, requests, speculation=ALWAYS) == [expected_tokens(tiny_model(), r) for r in requests]


# ---- mistakes


@pytest.mark.parametrize(("attention", "extras"), [("xqa", False), ("wrapper", True)])
async def test_everything_is_ordered(attention: str, extras: bool) -> None:
    device = OrderedDevice(1)
    requests = asked(1, extras)
    proposer = make_proposer(ALWAYS) if extras else Knowing(requests, 0.3, hesitates=True)
    executor = make(proposer, device=device, attention=attention)
    read_results(executor, device)
    await serve(executor, requests, speculation=ALWAYS)
    assert not device.found
    assert executor.counts["with drafts"] and executor.counts["launched behind another"]


class Accepting(CUDAExecutor):
    """All drafts count as right where the next row of their sequence begins."""

    def _decode(self, key: GraphKey) -> None:
        with mock.patch.object(cuda_decode, "accept", lambda *given: None):
            super()._decode(key)

    def _launch_mixed(self, *args: Any) -> Any:
        with mock.patch.object(cuda_mixed, "accept", lambda *given: None):
            return super()._launch_mixed(*args)


class StaleDrafts(CUDAExecutor):
    """Rows that are launched behind a step bring what was proposed before it."""

    def _needs_tokens(self, given: ForwardInput) -> bool:
        return False

    def _with_drafts(self, given: ForwardInput, handle: CudaHandle) -> ForwardInput:
        flying, self._in_flight = self._in_flight, 1
        try:
            return super()._with_drafts(given, handle)
        finally:
            self._in_flight = flying


class UpperBounds(CUDAExecutor):
    """Rows begin where the scheduler says that they may at most."""

    def _note_lengths(self, step: ForwardInput) -> None:
        super()._note_lengths(step)
        self._ahead[:] = np.where(self._ahead == -1, -1, 1 << 20)


class PaddingIsDrafts(CUDAExecutor):
    """Rows that fill up a graph's batch bring tokens, as drafts do."""

    @staticmethod
    def _pad(side: Side, rows: int, size: int, num_diffs: int) -> int:
        inside = CUDAExecutor._pad(side, rows, size, num_diffs)
        side.staging.token_ids[rows:size] = side.result[rows - 1]
        side.staging.row_slot[rows:size] = side.staging.row_slot[rows - 1]
        return inside


class FlatRowsOfOne(CUDAExecutor):
    """Drafts stand one place too far on."""

    @staticmethod
    def _flatten(step: ForwardInput, given: ForwardInput, side: Side) -> Any:
        flat, drafted = CUDAExecutor._flatten(step, given, side)
        rows = np.flatnonzero(side.staging.token_ids[: flat.num_decode_rows] >= 0)
        side.staging.row_start[rows] += 1
        return flat, drafted


MUTANTS = [Accepting, StaleDrafts, UpperBounds, PaddingIsDrafts, FlatRowsOfOne]


@pytest.mark.parametrize("kind", MUTANTS)
@pytest.mark.filterwarnings("ignore")
async def test_mutant_is_caught(kind: type[CUDAExecutor]) -> None:
    for seed in range(6):
        requests = requests_of(seed, 6)
        executor = make(
            Knowing(requests, 0.4, hesitates=True), device=FakeDevice(seed, (0.0, 0.5)[seed % 2]), kind=kind
        )
        try:
            tokens = await asyncio.wait_for(serve(executor, requests, speculation=ALWAYS), 30)
        except Exception:
            return
        if tokens != [expected_tokens(tiny_model(), request) for request in requests]:
            return
    pytest.fail("nothing noticed")

"""Rows with penalties and bad words that have drafts, on the fake device: the answers are those without drafts.

Each drafted position counts the drafts before it, and of what was drawn there that alone is remembered which became a
token.
"""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.executor.cuda import CUDAExecutor
from engine.executor.cuda_buffers import CudaHandle
from engine.forward import ForwardInput, Limits, RowExtras, Staging
from engine.ops.sampling.device_extras import DeviceExtras, ExtrasPlan
from engine.request import Request
from engine.speculation.registry import make_proposer
from engine.stream import Delta
from tests.cuda.fake_device import FakeDevice
from tests.cuda.ordered_device import OrderedDevice
from tests.cuda.support import ALWAYS, NO_DRAFTS, SMALL, answers_of, make_executor, requests_of
from tests.cuda.test_adapters import a_model, adapters_of
from tests.cuda.test_adapters import asked as with_adapters
from tests.cuda.test_draft_grammars import assert_same, bound
from tests.cuda.test_draft_heads import EAGLE, WITHOUT, make_eagle, target
from tests.cuda.test_draft_models import MODEL, itself, with_net
from tests.cuda.test_draft_models import make as make_model
from tests.cuda.test_drafts import DRAFTS, Watched, make
from tests.cuda.test_drafts_beside import Telling
from tests.cuda.test_failures import Failing
from tests.cuda.test_order import read_results
from tests.speculation import test_eagle3 as eagle3

# What looks at the text, and some that do not.
KINDS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.4, "logprobs": 2},
    {"frequency_penalty": 0.8, "presence_penalty": -0.3},
    {},
    {"presence_penalty": 1.2, "logit_bias": ((7, 3.0), (9, -50.0)), "logprobs": 0},
    {"bad_words": ((11,), (3, 5))},
    {"repetition_penalty": 0.8, "frequency_penalty": 0.3, "logprobs": 1},
    {"logprobs": 1},
]


def penalised(requests: list[Request], words: dict[int, tuple[tuple[int, ...], ...]] | None = None) -> list[Request]:
    """Each of another kind, and words that it may not say."""
    found = []
    for number, request in enumerate(requests):
        changes = dict(KINDS[number % len(KINDS)], max_tokens=16)
        if words and number in words:
            changes["bad_words"] = words[number]
        found.append(dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, **changes)))
    return found


async def without(requests: list[Request], limits: Limits = SMALL, **options: Any) -> list[Delta]:
    return await asyncio.wait_for(answers_of(make_executor(limits, **options), requests), 60)


async def forbidding(seed: int, count: int = 8) -> tuple[list[Request], list[Delta]]:
    """Requests, and what they bring. Every third may not say what it would say in the end, by words of two, three and
    five tokens, one of which would come and one of which begins as what would."""
    requests = penalised(requests_of(seed, count))
    answers = [delta.token_ids for delta in await without(requests)]
    words = {
        number: (tuple(answers[number][3:5]), tuple(answers[number][5:8]), (*answers[number][8:12], 4))
        for number in range(1, count, 3)
    }
    requests = penalised(requests_of(seed, count), words)
    return requests, await without(requests)


class Tallying(Watched):
    """counts, too: right drafts of rows whose sampling looks at the text, by slot, and of the others."""

    def _follow(self, handle: CudaHandle, output: Any) -> None:
        super()._follow(handle, output)
        if output.accepted is None or handle.given is None:
            return
        given = handle.given
        slots = given.staging.row_slot[given.num_decode_rows :][: given.num_speculating_rows]
        for slot, count in zip(slots.tolist(), output.accepted.counts.tolist(), strict=True):
            extras = self._extras._slots.get(slot)
            reads = extras is not None and (
                extras.repetition_penalty != 1.0
                or extras.presence_penalty != 0.0
                or extras.frequency_penalty != 0.0
                or any(len(word) > 1 for word in extras.bad_words)
            )
            self.counts["right, penalised" if reads else "right, others"] += count - 1


@pytest.mark.parametrize(
    ("attention", "mode", "seed", "wrong", "overlap"),
    [
        ("torch", "lazy", 0, 0.0, True),
        ("xqa", "start", 1, 0.3, True),
        ("wrapper", "off", 2, 0.3, False),
        ("wrapper", "lazy", 3, 0.6, True),
        ("torch", "lazy", 4, 1.0, True),
    ],
)
async def test_answers_are_those_without_drafts(
    attention: str, mode: str, seed: int, wrong: float, overlap: bool
) -> None:
    requests, expected = await forbidding(seed)
    told = [(request, delta.token_ids) for request, delta in zip(requests, expected, strict=True)]
    device = FakeDevice(seed, (0.0, 0.3, 0.9)[seed % 3])
    executor = make(
        Telling(told, wrong, hesitates=seed == 1),
        kind=Tallying,
        device=device,
        attention=attention,
        cuda_graph=mode,
    )
    if mode == "start":
        executor.capture_at_start()
    found = await asyncio.wait_for(answers_of(executor, requests, speculation=ALWAYS, overlap=overlap), 60)
    assert_same(found, expected)
    counts = executor.counts
    assert wrong == 1.0 or (counts["right, penalised"] > 20 and counts["right, others"] > 5)


@pytest.mark.parametrize("seed", range(3))
async def test_log_probabilities_as_tokens_are_drawn(seed: int) -> None:
    requests = penalised(requests_of(seed))
    limits = dataclasses.replace(SMALL, processed_logprobs=True)
    expected = await without(requests, limits)
    told = [(request, delta.token_ids) for request, delta in zip(requests, expected, strict=True)]
    drafting = dataclasses.replace(limits, max_draft_tokens=5)
    executor = make(Telling(told, 0.3), drafting, kind=Tallying, device=FakeDevice(seed, 0.3))
    found = await asyncio.wait_for(answers_of(executor, requests, speculation=ALWAYS), 60)
    assert_same(found, expected)
    assert executor.counts["right, penalised"] > 10


async def test_what_is_looked_up_in_the_text_and_few_pages() -> None:
    """Sequences are retracted, and come back with what was counted."""
    requests = [
        dataclasses.replace(each, prompt_token_ids=(each.prompt_token_ids * 4)[:24])
        for each in penalised(requests_of(5, 7))
    ]
    expected = await without(requests)
    executor = make(
        make_proposer(ALWAYS), dataclasses.replace(DRAFTS, num_pages=26), kind=Tallying, device=FakeDevice(3, 0.3)
    )
    found = await asyncio.wait_for(answers_of(executor, requests, speculation=ALWAYS), 60)
    assert_same(found, expected)
    assert executor.counts["drafts"]


@pytest.mark.parametrize(("attention", "seed"), [("torch", 1), ("xqa", 2), ("wrapper", 3)])
async def test_drafts_of_a_model(attention: str, seed: int) -> None:
    """Beside grammars, whose rows have penalties, too."""
    requests = [*penalised(requests_of(seed, 7)), *bound(penalised(requests_of(seed + 10, 7)))]
    requests = [dataclasses.replace(each, request_id=f"r{number}") for number, each in enumerate(requests)]

    def anew() -> list[Request]:
        return [
            dataclasses.replace(each, constraint=None if each.constraint is None else each.constraint.copy())
            for each in requests
        ]

    expected = await without(anew())
    executor = make_model(
        with_net(itself, attention), device=FakeDevice(seed, (0.0, 0.3, 0.9)[seed % 3]), attention=attention
    )
    found = await asyncio.wait_for(answers_of(executor, anew(), speculation=MODEL), 60)
    assert_same(found, expected)
    assert executor.counts["accepted"] > 20


async def test_drafts_of_a_head(tmp_path: Path) -> None:
    eagle3.write_head(tmp_path, "plain")
    requests = penalised(requests_of(2))
    executor = make_eagle(tmp_path, device=FakeDevice(2, 0.3))
    found = await asyncio.wait_for(answers_of(executor, requests, speculation=EAGLE), 60)
    assert_same(found, await without(requests, WITHOUT, model=target()))
    assert executor.counts["made"] > 20


async def test_rows_with_adapters(tmp_path: Path) -> None:
    answers: list[list[Delta]] = []
    for speculation in (NO_DRAFTS, ALWAYS):
        executor: Any = make_executor(SMALL, model=a_model("llama"))  # which takes the model from the one before it
        proposer = Telling([], 0.3)
        if answers:
            executor = make(proposer, kind=Tallying, device=FakeDevice(3, 0.3), model=a_model("llama"))
        folder = tmp_path / str(len(answers))
        requests = penalised(with_adapters(adapters_of("llama", executor, folder), seed=2))
        if answers:
            told = zip(requests, [delta.token_ids for delta in answers[0]], strict=True)
            proposer._answers = Telling(list(told), 0.3)._answers
        answers.append(await asyncio.wait_for(answers_of(executor, requests, speculation=speculation), 60))
    assert_same(answers[1], answers[0])
    assert executor.counts["right, penalised"] > 20


@pytest.mark.parametrize("attention", ["xqa", "wrapper"])
async def test_everything_is_ordered(attention: str) -> None:
    device = OrderedDevice(1)
    requests, expected = await forbidding(1)
    told = [(request, delta.token_ids) for request, delta in zip(requests, expected, strict=True)]
    executor = make(Telling(told, 0.3), kind=Tallying, device=device, attention=attention)
    read_results(executor, device)
    await asyncio.wait_for(answers_of(executor, requests, speculation=ALWAYS), 60)
    assert not device.found and executor.counts["right, penalised"] > 20


async def test_a_step_that_fails_at_any_launch_spoils_no_token() -> None:
    requests, expected = await forbidding(2)
    told = [(request, delta.token_ids) for request, delta in zip(requests, expected, strict=True)]
    for number in range(1, 20):
        executor = make(Telling(told, 0.2), kind=Tallying, device=FakeDevice(number, (0.0, 0.4)[number % 2]))
        failing = Failing(executor, "_draw_open", number)
        found = await asyncio.wait_for(answers_of(executor, requests, speculation=ALWAYS), 60)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.token_ids == theirs.token_ids[: len(ours.token_ids)], f"launch {number}"
        if not failing.failed:
            assert_same(found, expected)
            break
    else:
        pytest.fail("it never came through")
    assert executor.counts["right, penalised"]


# ---- parts

VOCAB = 40


def extras_of(slot: int, history: list[int], **changes: Any) -> RowExtras:
    values: dict[str, Any] = {
        "presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "logit_bias": (),
        "allowed_token_ids": None, "bad_words": (), "logprobs": None, "prompt_logprobs": None,
    }  # fmt: skip
    return RowExtras(slot=slot, history=np.array(history, np.int32), num_prompt_tokens=3, **values | changes)


@pytest.mark.parametrize("seed", range(12))
def test_rows_with_drafts_are_steps_one_after_another(seed: int) -> None:
    """Of penalties and words of up to six tokens, behind right drafts and wrong ones."""
    rng = np.random.default_rng(seed)
    limits = dataclasses.replace(SMALL, vocab_size=VOCAB, max_draft_tokens=7)
    ours, alone = (DeviceExtras(limits, lambda shape, dtype: torch.zeros(shape, dtype=dtype)) for _ in range(2))
    step: Any = ForwardInput(0, Staging(SMALL), 0, 0, 0, 0, 0)
    texts = {slot: rng.integers(0, 4, int(rng.integers(3, 9))).tolist() for slot in (1, 2, 3, 4)}
    kinds: list[dict[str, Any]] = [
        {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.2},
        {"bad_words": tuple(tuple(rng.integers(0, 4, length).tolist()) for length in (2, 2, 3, 3, 4, 6))},
        {"frequency_penalty": -0.4, "bad_words": tuple(tuple(rng.integers(0, 4, 2).tolist()) for _ in range(5))},
        {},
    ]
    step.extras = [extras_of(slot, texts[slot], **kinds[slot - 1]) for slot in (1, 2, 3)]

    def send(arrays: Any) -> list[Tensor]:
        return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]

    for each in (ours, alone):
        for work in each.apply(step, send):
            work()
    for _ in range(4):
        slots, drafts, drawn, begins = [], [], [], []
        for slot in rng.permutation([1, 2, 3, 4]).tolist():
            begins.append(len(slots))
            own = rng.integers(0, 4, int(rng.integers(0, 8))).tolist()
            right = int(rng.integers(0, len(own) + 1))
            slots += [slot] * (1 + len(own))
            drafts += [-1, *own]
            drawn += [*own[:right], 9, *rng.integers(0, 4, len(own) - right).tolist()]
        logits = torch.from_numpy(rng.normal(size=(len(slots), VOCAB)).astype(np.float32))
        names, there = torch.tensor(slots), torch.tensor(drafts, dtype=torch.int32)
        plan = ours.plan(np.array(slots, np.int32), send)
        assert plan is not None
        found = ours.adjust(logits, names, plan, there)
        ours.note(names, torch.tensor(drawn, dtype=torch.int32), there)
        for begin in begins:
            row, slot = begin, slots[begin]
            while True:
                known = alone.plan(np.array([slot], np.int32), send)
                one = logits[row : row + 1]
                theirs = one if known is None else alone.adjust(one, names[row : row + 1], known)
                assert torch.equal(found[row], theirs[0]), (slot, row - begin)
                alone.note(names[row : row + 1], torch.tensor(drawn[row : row + 1], dtype=torch.int32))
                if row + 1 == len(slots) or drafts[row + 1] != drawn[row]:
                    break
                row += 1
        for table in ("_counts", "_tails"):
            mine, other = getattr(ours, table), getattr(alone, table)
            assert torch.equal(mine[1:], other[1:]), table


# ---- mistakes


class Uncounted(DeviceExtras):
    """Drafts are not counted where they are tried."""

    def adjust(self, logits: Tensor, slots: Tensor, plan: ExtrasPlan, drafts: Tensor | None = None) -> Tensor:
        return super().adjust(logits, slots, plan)


class Everything(DeviceExtras):
    """What was drawn behind wrong drafts is remembered as well."""

    def note(self, slots: Tensor, tokens: Tensor, drafts: Tensor | None = None) -> None:
        super().note(slots, tokens)


class Shifted(DeviceExtras):
    """Each row counts the draft after it instead of its own."""

    def adjust(self, logits: Tensor, slots: Tensor, plan: ExtrasPlan, drafts: Tensor | None = None) -> Tensor:
        if drafts is not None and len(drafts) > 1:
            drafts = torch.cat((drafts[:1], drafts[2:], drafts[:1]))
        return super().adjust(logits, slots, plan, drafts)


@pytest.mark.parametrize("kind", [Uncounted, Everything, Shifted])
@pytest.mark.filterwarnings("ignore")
async def test_mutant_is_caught(kind: type[DeviceExtras], monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(3):
        requests, expected = await forbidding(seed)
        told = [(request, delta.token_ids) for request, delta in zip(requests, expected, strict=True)]
        with monkeypatch.context() as patched:
            patched.setattr("engine.executor.cuda_state.DeviceExtras", kind)
            executor: CUDAExecutor = make(Telling(told, 0.3), kind=Tallying, device=FakeDevice(seed, 0.5))
        try:
            assert_same(await asyncio.wait_for(answers_of(executor, requests, speculation=ALWAYS), 30), expected)
        except Exception:
            return
    pytest.fail("nothing noticed")

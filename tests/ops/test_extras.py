"""engine/ops/sampling/extras.py and logprobs.py against loops over plain Python lists, and torch's log_softmax."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from engine.forward import ForwardInput, Limits, PromptLogprobs, RowExtras, Staging, StepLogprobs
from engine.ops.sampling import logprobs
from engine.ops.sampling.extras import SlotExtras
from engine.ops.sampling.logprobs import normalise, ranks
from engine.ops.sampling.sampler import sample
from tests.ops.test_sampling import DRAWS, exact, params

Floats = npt.NDArray[np.float32]
VOCAB = 97


def extras_of(slot: int, history: list[int], num_prompt: int | None = None, **fields: Any) -> RowExtras:
    given: dict[str, Any] = {
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "logit_bias": (),
        "allowed_token_ids": None,
        "bad_words": (),
        "logprobs": None,
        "prompt_logprobs": None,
    }
    prompt = len(history) if num_prompt is None else num_prompt
    return RowExtras(slot, np.array(history, np.int32), prompt, **{**given, **fields})


class Slots:
    """SlotExtras, fed as an executor feeds it."""

    def __init__(self, num_slots: int = 80, vocab: int = VOCAB, *, processed: bool = False) -> None:
        self.limits = Limits(num_slots, max(num_slots, 64), 4096, 16, 64, vocab, processed_logprobs=processed)
        self.extras = SlotExtras(self.limits)
        self.staging = Staging(self.limits)

    def fill(self, *changes: RowExtras | int) -> None:
        """Give slots a new sampling row, with extras or (a bare slot) without."""
        slots = [change if isinstance(change, int) else change.slot for change in changes]
        self.staging.sampling_slot[: len(slots)] = slots
        self.extras.apply(
            ForwardInput(
                0, self.staging, 0, 0, 0, 0, len(slots), [change for change in changes if isinstance(change, RowExtras)]
            )
        )

    def step(
        self, logits: Floats, slots: list[int], positions: list[int] | None = None, table: Any = None
    ) -> tuple[Floats, npt.NDArray[np.int32], StepLogprobs | None]:
        """The logits that the sampler sees, what it draws (greedy by default), and the log-probabilities."""
        own = torch.from_numpy(logits.copy())
        at = np.array(positions or [0] * len(slots), np.int32)
        table = params(len(slots)) if table is None else table
        draw = self.extras.begin(own, np.array(slots, np.int32), at, table)
        changed = own if draw is None else draw.logits
        seen = changed.numpy().copy()
        drawn = sample(changed, table, at)
        rows = np.arange(100, 100 + len(slots))
        return seen, drawn, None if draw is None else self.extras.end(draw, drawn, rows)


def reference(logits: Floats, extras: RowExtras, tokens: list[int]) -> Floats:
    """vLLM's order, one token at a time. tokens: prompt and output so far."""
    x = logits.astype(np.float32).copy()
    output = tokens[extras.num_prompt_tokens :]
    for token in range(len(x)):
        if extras.allowed_token_ids is not None and token not in extras.allowed_token_ids:
            x[token] = -np.inf
    for word in extras.bad_words:
        before = list(word[:-1])
        if not before or tokens[-len(before) :] == before:
            x[word[-1]] = -np.inf
    for token, bias in extras.logit_bias:
        x[token] += np.float32(bias)
    repetition = np.float32(extras.repetition_penalty)
    for token in set(tokens):
        x[token] = x[token] / repetition if x[token] > 0 else x[token] * repetition
    for token in set(output):
        x[token] -= np.float32(extras.frequency_penalty) * np.float32(output.count(token))
        x[token] -= np.float32(extras.presence_penalty)
    return x


def some_extras(rng: np.random.Generator, slot: int) -> RowExtras:
    """A row that asks for some of everything."""

    def maybe(value: Any, otherwise: Any) -> Any:
        return value if rng.random() < 0.5 else otherwise

    history = rng.integers(0, VOCAB, int(rng.integers(1, 60))).tolist()
    words = tuple(tuple(rng.integers(0, VOCAB, int(rng.integers(1, 4))).tolist()) for _ in range(4))
    # One that does stand there.
    words += ((history[-1], int(rng.integers(0, VOCAB))),)
    return extras_of(
        slot,
        history,
        int(rng.integers(1, len(history) + 1)),
        presence_penalty=maybe(float(rng.uniform(-2, 2)), 0.0),
        frequency_penalty=maybe(float(rng.uniform(-2, 2)), 0.0),
        repetition_penalty=maybe(float(rng.uniform(0.5, 2)), 1.0),
        logit_bias=maybe(tuple((int(i), float(rng.uniform(-9, 9))) for i in rng.permutation(VOCAB)[:7]), ()),
        allowed_token_ids=maybe(tuple(rng.permutation(VOCAB)[:40].tolist()), None),
        bad_words=maybe(words, ()),
        logprobs=maybe(int(rng.integers(0, 12)), None),
    )


def check_logprobs(found: StepLogprobs, asked: dict[int, int], logits: Floats, drawn: npt.NDArray[np.int32]) -> None:
    """asked: row -> alternatives."""
    assert found.rows.tolist() == [100 + row for row in asked]
    expected = torch.log_softmax(torch.from_numpy(logits), -1).numpy()
    for index, (row, k) in enumerate(asked.items()):
        own = expected[row, drawn[row]]
        np.testing.assert_allclose(found.token_logprobs[index], own, rtol=1e-5, atol=1e-5)
        assert found.ranks[index] == 1 + (logits[row] > logits[row, drawn[row]]).sum()
        order = np.argsort(-logits[row], kind="stable")[:k]
        assert found.top_ids[index, :k].tolist() == order.tolist()
        np.testing.assert_allclose(found.top_logprobs[index, :k], expected[row, order], rtol=1e-5, atol=1e-5)
        # The same token has the same bits in both places: lm-eval compares them.
        same = np.flatnonzero(found.top_ids[index, :k] == drawn[row])
        assert (found.top_logprobs[index, same] == found.token_logprobs[index]).all()


def test_64_rows_of_all_kinds_over_many_steps(mode: str) -> None:
    rng = np.random.default_rng(3)
    slots, rows = Slots(), 64
    tokens: dict[int, list[int]] = {}
    asked: dict[int, RowExtras] = {}
    for step in range(30):
        # Slots come and go, with extras and without, and rows change their order.
        changes: list[RowExtras | int] = []
        for slot in rng.permutation(np.arange(1, 81))[: 80 if step == 0 else 5].tolist():
            if rng.random() < 0.3:
                changes.append(slot)
                asked.pop(slot, None)
                tokens[slot] = [1]
            else:
                asked[slot] = some_extras(rng, slot)
                changes.append(asked[slot])
                tokens[slot] = asked[slot].history.tolist()
        slots.fill(*changes)
        if step % 3 == 0:
            order = rng.permutation(np.arange(1, 81))[:rows].tolist()
        logits = (3 * rng.standard_normal((rows, VOCAB))).astype(np.float32)
        table = params(rows, temperature=rng.choice([0.0, 1.0], rows), seed=rng.integers(0, 2**63, rows, np.uint64))
        seen, drawn, found = slots.step(logits, order, [len(tokens[slot]) for slot in order], table)
        for row, slot in enumerate(order):
            if slot in asked:
                np.testing.assert_array_equal(seen[row], reference(logits[row], asked[slot], tokens[slot]))
            else:
                np.testing.assert_array_equal(seen[row], logits[row])
            tokens[slot].append(int(drawn[row]))
        wanting = {
            row: asked[slot].logprobs or 0
            for row, slot in enumerate(order)
            if slot in asked and asked[slot].logprobs is not None
        }
        assert found is not None
        check_logprobs(found, wanting, logits, drawn)


def test_a_row_of_a_refilled_slot_goes_on_as_before() -> None:
    """Retraction: the history then holds the outputs so far, and the row may come back in another slot."""
    rng = np.random.default_rng(5)
    asked = dataclasses.replace(some_extras(rng, 1), bad_words=((4, 5, 6), (5,)), repetition_penalty=1.3)
    one, other = Slots(), Slots()
    one.fill(asked)
    tokens = asked.history.tolist()
    for step in range(40):
        logits = rng.standard_normal((1, VOCAB)).astype(np.float32)
        seen, drawn, _ = one.step(logits, [1])
        slot = 2 + step % 5
        other.fill(dataclasses.replace(asked, slot=slot, history=np.array(tokens, np.int32)))
        np.testing.assert_array_equal(other.step(logits, [slot])[0], seen)
        tokens.append(int(drawn[0]))


def test_a_batch_without_extras_is_left_alone() -> None:
    slots = Slots()
    logits = np.zeros((2, VOCAB), np.float32)
    table, at = params(2), np.zeros(2, np.int32)
    own = torch.from_numpy(logits)
    assert slots.extras.count == 0
    slots.fill(extras_of(3, [1], presence_penalty=1.0), 4)
    assert slots.extras.count == 1
    assert slots.extras.begin(own, np.array([4, 5], np.int32), at, table) is None
    slots.fill(3)
    assert slots.extras.count == 0
    assert slots.extras.begin(own, np.array([3, 4], np.int32), at, table) is None


PENALTIES: list[dict[str, Any]] = [
    {"presence_penalty": 1.5},
    {"frequency_penalty": -0.7},
    {"repetition_penalty": 1.4},
    {"logit_bias": ((3, 2.0), (9, -100.0), (30, -1.5))},
    {"allowed_token_ids": tuple(range(3, 20))},
    {"bad_words": ((7,), (11, 12), (12, 13, 8), (13, 9))},
    {"presence_penalty": 0.5, "frequency_penalty": 0.3, "repetition_penalty": 0.8, "logit_bias": ((3, 2.0),)},
]


@pytest.mark.parametrize("fields", PENALTIES, ids=lambda fields: "+".join(fields))
def test_draws_follow_the_changed_distribution(mode: str, fields: dict[str, Any]) -> None:
    """Chi-square of 20k draws: the penalties come before temperature and filters."""
    rng = np.random.default_rng(11)
    history = [*rng.integers(0, 40, 30).tolist(), 12, 13]
    asked = extras_of(1, history, 20, **fields)
    slots = Slots(vocab=40)
    slots.fill(asked)
    logits = (2 * rng.standard_normal((1, 40))).astype(np.float32)
    seen, _, _ = slots.step(logits, [1])
    p = exact(reference(logits[0], asked, history).astype(np.float64), 0.8, top_k=30, top_p=0.95)
    table = params(DRAWS, temperature=0.8, top_k=30, top_p=0.95, seed=rng.integers(0, 2**63, DRAWS, np.uint64))
    many = torch.from_numpy(np.repeat(seen, DRAWS, axis=0))
    drawn = np.bincount(sample(many, table, np.zeros(DRAWS, np.int32)), minlength=40)
    assert drawn[p == 0].sum() == 0
    kept = p * DRAWS >= 5
    expected, got = np.append(p[kept], p[~kept].sum()) * DRAWS, np.append(drawn[kept], drawn[~kept].sum())
    expected, got = expected[expected > 0], got[expected > 0]
    chi = ((got - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    # The seed is fixed, so this is no lottery: five standard deviations of the chi-square distribution.
    assert chi < freedom + 5 * (2 * freedom) ** 0.5


def test_log_probabilities_are_raw_whatever_masks_the_row(mode: str) -> None:
    """Stop ids masked by the sampler, allowed ids, and masks that others will apply."""
    rng = np.random.default_rng(2)
    slots = Slots()
    slots.fill(extras_of(1, [3], logprobs=2), extras_of(2, [3], logprobs=3, allowed_token_ids=(5, 6)))
    logits = rng.standard_normal((2, VOCAB)).astype(np.float32)
    logits[:, 40] = 9.0
    table = params(2, min_length=10, num_stop_ids=2)
    table["stop_ids"][:, :2] = [40, VOCAB + 5]
    _, drawn, found = slots.step(logits, [1, 2], [4, 4], table)
    assert found is not None and 40 not in drawn and found.top_ids[:, 0].tolist() == [40, 40]
    check_logprobs(found, {0: 2, 1: 3}, logits, drawn)

    own = torch.from_numpy(logits.copy())
    draw = slots.extras.begin(own, np.array([1, 2], np.int32), np.array([20, 20], np.int32), table, masked=True)
    assert draw is not None
    draw.logits[:, 10:] = -torch.inf
    drawn = sample(draw.logits, table, np.array([20, 20], np.int32))
    found = slots.extras.end(draw, drawn, np.array([100, 101]))
    assert found is not None and drawn[0] < 10
    check_logprobs(found, {0: 2, 1: 3}, logits, drawn)


def test_processed_log_probabilities_are_of_what_was_drawn_from(mode: str) -> None:
    """Penalties, bans, stop ids, temperature and filters; masks of others; and what raw ones do not show."""
    rng = np.random.default_rng(7)
    slots = Slots(processed=True)
    extras = [dataclasses.replace(some_extras(rng, slot), logprobs=slot % 4) for slot in range(1, 30)]
    slots.fill(*extras)
    table = params(29, temperature=rng.choice([0.0, 0.6, 1.7], 29), seed=range(29), min_length=3)
    table["top_k"], table["top_p"] = rng.choice([0, 9], 29), rng.choice([1.0, 0.8], 29)
    table["num_stop_ids"], table["stop_ids"][:, 0] = 1, rng.integers(0, VOCAB, 29)
    at = rng.integers(0, 6, 29).astype(np.int32)
    for masked in (False, True):
        logits = (3 * rng.standard_normal((29, VOCAB))).astype(np.float32)
        own = torch.from_numpy(logits.copy())
        draw = slots.extras.begin(own, np.arange(1, 30, dtype=np.int32), at, table, masked=masked)
        assert draw is not None
        if masked:
            draw.logits[4, 10:] = -torch.inf
        expected = draw.logits.numpy().copy()
        drawn = sample(draw.logits, table, at)
        found = slots.extras.end(draw, drawn, np.arange(100, 129))
        assert found is not None and found.rows.tolist() == list(range(100, 129))
        for row, one in enumerate(extras):
            x, given = expected[row].astype(np.float64), table[row]
            if at[row] < 3:
                x[given["stop_ids"][0]] = -np.inf
            greedy = given["temperature"] == 0
            filters = {} if greedy else {"top_k": int(given["top_k"]), "top_p": float(given["top_p"])}
            chance = exact(x, 1.0 if greedy else float(given["temperature"]), **filters)
            np.testing.assert_allclose(np.exp(found.token_logprobs[row]), chance[drawn[row]], rtol=1e-4)
            assert found.ranks[row] == 1 + (chance > chance[drawn[row]] * (1 + 1e-6)).sum()
            best = np.sort(chance)[::-1][: one.logprobs]
            np.testing.assert_allclose(np.exp(found.top_logprobs[row, : one.logprobs]), best, rtol=1e-4, atol=1e-12)


def test_ranks_and_alternatives_of_equal_and_infinite_logits(mode: str) -> None:
    logits = torch.zeros(3, 50)
    logits[1, 7:] = -torch.inf
    logits[2, [30, 4, 9]] = 5.0
    rows = np.arange(3)
    found = normalise(logits, rows, 9)
    assert found.top_ids[0, :9].tolist() == list(range(9))
    assert found.top_ids[1, :7].tolist() == list(range(7))
    assert found.top_ids[2, :5].tolist() == [4, 9, 30, 0, 1]
    np.testing.assert_allclose(found.log_sum + found.top[:, 0], torch.logsumexp(logits, -1).numpy(), rtol=1e-6)
    values = np.array([0.0, -np.inf, 0.0], np.float32)
    assert ranks(logits, rows, values, found).tolist() == [1, 8, 4]
    assert (found.top[1, 7:] == -np.inf).all()


def test_figures_of_a_row_do_not_depend_on_the_others(mode: str) -> None:
    rng = np.random.default_rng(1)
    logits = torch.from_numpy((4 * rng.standard_normal((33, 5003))).astype(np.float32))
    threads = torch.get_num_threads()
    together = normalise(logits, np.arange(33), 20)
    try:
        torch.set_num_threads(2)
        for row in (0, 17, 32):
            for k in (1, 20):
                alone = normalise(logits[row : row + 1].clone(), np.zeros(1, np.int64), k)
                among = normalise(logits, np.array([3, row]), k)
                assert alone.log_sum[0] == among.log_sum[1] == together.log_sum[row]
                assert (alone.top_ids[0, :k] == together.top_ids[row, :k]).all()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("rows_at_once", [3, 1000])
def test_prompt_logprobs_by_chunks(mode: str, rows_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all prompt tokens but the first, however it is cut; in slices, so that memory stays bounded."""
    vocab = VOCAB
    monkeypatch.setattr(logprobs, "SLICE_ELEMENTS", rows_at_once * vocab + 1)
    rng = np.random.default_rng(4)
    # A model of one number per token, whose logits are that number times a vector.
    head = torch.from_numpy(rng.standard_normal((1, vocab)).astype(np.float32))
    made: list[int] = []

    def make_logits(hidden: torch.Tensor) -> torch.Tensor:
        made.append(len(hidden))
        return hidden @ head

    tokens = rng.integers(0, vocab, 8).tolist()
    hidden = torch.arange(8, dtype=torch.float32)[:, None]
    slots = Slots(vocab=vocab)
    slots.fill(extras_of(1, tokens, prompt_logprobs=3), extras_of(2, tokens, 6, prompt_logprobs=1), 3)
    whole: list[PromptLogprobs] = []
    for start, end in ((0, 3), (3, 7), (7, 8)):
        staging = slots.staging
        staging.row_slot[:3] = [3, 1, 2]
        staging.row_start[:3] = start
        staging.row_len[:3] = end - start
        staging.qo_indptr[:4] = np.arange(4) * (end - start)
        step = ForwardInput(0, staging, 3, 0, 3 * (end - start), 0, 0)
        rows = torch.cat([torch.zeros(end - start, 1), hidden[start:end], torch.zeros(end - start, 1)])
        whole += slots.extras.prompt_logprobs(step, rows, make_logits)
    # Slot 2 has output: its prompt's answer was given before it was retracted. The last chunk has no target.
    assert [(found.row, found.first, len(found.token_logprobs)) for found in whole] == [(1, 1, 3), (1, 4, 4)]
    assert made == ([3, 3, 1] if rows_at_once == 3 else [3, 4])
    raw = (hidden @ head).numpy()
    expected = torch.log_softmax(hidden @ head, -1).numpy()
    for found in whole:
        for index in range(len(found.token_logprobs)):
            place = found.first + index
            np.testing.assert_allclose(
                found.token_logprobs[index], expected[place - 1, tokens[place]], rtol=1e-5, atol=1e-5
            )
            assert found.ranks[index] == 1 + (raw[place - 1] > raw[place - 1, tokens[place]]).sum()
            assert found.top_ids[index].tolist() == np.argsort(-raw[place - 1], kind="stable")[:3].tolist()

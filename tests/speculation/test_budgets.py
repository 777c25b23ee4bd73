"""Budgets of drafts: what they come to where drafts pay, where they do not, and where that changes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from engine.config import SpeculationOptions
from engine.forward import Limits
from engine.speculation.budgets import DraftBudgets, StepCosts

MOST = 8
LIMITS = Limits(64, 1024, 64, 4, 64, 100, max_draft_tokens=MOST)


class Device:
    """Rows whose drafts are right with a chance of their own, and steps that cost what `cost` says."""

    def __init__(self, chances: list[float], cost: Callable[[int], float], options: SpeculationOptions | None = None):
        self.budgets = DraftBudgets(LIMITS, options or SpeculationOptions())
        self.slots = np.arange(1, 1 + len(chances))
        self.chances, self.cost = chances, cost
        self.random = np.random.default_rng(0)
        for slot in self.slots.tolist():
            self.budgets.begin(slot)

    def run(self, steps: int) -> tuple[float, float]:
        """Drafts of a row and step, and tokens per second."""
        drafts = tokens = seconds = 0.0
        for _ in range(steps):
            counts = self.budgets.plan(self.slots)
            assert counts.dtype == np.int32 and counts.min() >= 0 and counts.max() <= MOST
            right = np.array(
                [int(np.cumprod(self.random.random(n) < p).sum()) for n, p in zip(counts, self.chances, strict=True)],
                np.int32,
            )
            took = self.cost(len(counts) + int(counts.sum()))
            self.budgets.observe(self.slots, counts, right)
            self.budgets.took(len(counts) + int(counts.sum()), took)
            drafts, tokens, seconds = drafts + counts.sum(), tokens + len(counts) + right.sum(), seconds + took
        return drafts / steps / len(self.slots), tokens / seconds


def flat(num_tokens: int) -> float:
    """A step that reads all weights, and hardly more for a token."""
    return 1.0 + 0.01 * num_tokens


def steep(num_tokens: int) -> float:
    """Every token costs the same."""
    return float(num_tokens)


def early(num_tokens: int) -> float:
    """A processor that multiplies 32 rows nearly as it does 16, and from there on pays for each."""
    return float(np.interp(num_tokens, [1, 16, 32, 48, 64, 200], [0.13, 0.42, 0.6, 0.95, 1.35, 4.4]))


@pytest.mark.parametrize(
    ("chances", "cost", "least", "most"),
    [
        ([0.95], flat, 5.0, MOST),
        ([0.0], flat, 0.0, 1.0),
        ([0.95] * 16, steep, 0.0, 0.1),
        ([0.95] * 16, lambda tokens: max(1.0, tokens / 32), 0.7, 2.0),
        ([0.85] * 16, early, 0.7, 1.3),
    ],
    ids=["right", "wrong", "no free token", "a knee", "cheap at first"],
)
def test_where_they_settle(chances: list[float], cost: Callable[[int], float], least: float, most: float) -> None:
    device = Device(chances, cost)
    device.run(300)
    drafts, speed = device.run(1500)
    assert least <= drafts <= most
    # Never slower than without drafts, but for the trials.
    assert speed >= 0.97 * len(chances) / cost(len(chances))


def test_a_large_step_is_not_the_first_that_is_tried() -> None:
    """One step of 144 tokens costs what eight without drafts do, and says nothing of one of 32."""
    device = Device([0.85] * 16, early)
    speed = device.run(24)[1]
    assert speed >= 1.05 * 16 / early(16)


def test_each_row_has_what_its_own_drafts_are_worth() -> None:
    device = Device([0.98, 0.1], flat)
    device.run(400)
    good, bad = np.mean([device.budgets.plan(device.slots) for _ in range(63)], axis=0)
    assert good > 4 and bad < 2


def test_they_come_back() -> None:
    device = Device([0.0], flat)
    device.run(600)
    device.chances = [1.0]
    device.run(600)
    assert device.run(200)[0] > 5


def test_a_new_sequence_begins_anew() -> None:
    device = Device([0.0], flat)
    device.run(600)
    assert device.budgets.plan(device.slots)[0] <= 1
    device.budgets.begin(1)
    assert device.budgets.plan(device.slots)[0] >= 1


def test_by_batch_size() -> None:
    options = SpeculationOptions(by_batch_size=((1, 2, 5), (3, 64, 0)), adaptive=False)
    budgets = DraftBudgets(LIMITS, options)
    assert budgets.plan(np.arange(1, 3)).tolist() == [5, 5] and budgets.plan(np.arange(1, 4)).tolist() == [0, 0, 0]
    assert DraftBudgets(LIMITS, SpeculationOptions(adaptive=False)).plan(np.arange(1, 3)).tolist() == [MOST, MOST]


def test_costs_are_interpolated_and_one_hiccup_says_little() -> None:
    costs = StepCosts(64)
    assert costs.estimate(np.array([1.0, 2.0, 9.0])).tolist() == [1.0, 1.0, 4.5]
    for _ in range(5):
        costs.measured(1, 1.0)
        costs.measured(64, 3.0)
    costs.measured(1, 1000.0)
    first, middle, last = costs.estimate(np.array([1.0, 32.0, 64.0]))
    assert first <= 1.06 and first < middle < last == pytest.approx(3.0)

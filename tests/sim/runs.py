"""The runs of many seeds, in parts that are tests: each has troubles of all kinds, or shows nothing."""

from __future__ import annotations

from typing import Any

from tests.sim.simulator import Report, simulate

SEEDS_PER_TEST = 100
# In two files, so that they run beside each other: with the others here, a million ticks of CI. Each is 16 seconds.
NUM_TESTS = 30
DRAFTED_GRAMMARS = {
    "max_draft_tokens": 4, "draft_accuracy": 0.95, "budgets": "all", "num_snapshots": None, "constrained_rate": 0.8,
    "jump_ahead": False, "max_model_len": 40, "culprit_rate": 0.0, "spoil_rate": 0.0, "transfer_rate": 0.0,
}  # fmt: skip


def part(number: int) -> int:
    """The seeds of one test; returns their ticks, about 28,000."""
    first = number * SEEDS_PER_TEST
    total = Report()
    runs: list[tuple[int, dict[str, Any]]] = [(seed, {}) for seed in range(first, first + SEEDS_PER_TEST)]
    # Drafts under grammars are rare among those.
    runs += [(seed, DRAFTED_GRAMMARS | {"unseen_drafts": seed % 2 == 1}) for seed in range(first, first + 20)]
    for seed, changes in runs:
        report = simulate(seed, **changes)
        for name, value in vars(report).items():
            if name != "answers":
                setattr(total, name, getattr(total, name) + value)
    # A simulation that never gets into trouble shows nothing.
    assert total.ticks > 15_000 and total.finished > 500
    assert total.jumped_tokens > 500
    assert total.drafts > 400 and total.right_drafts > 200 and total.cut_by_grammar > 0
    assert total.guilty > 10 and total.spoiled > 10
    assert total.retractions > 20 and total.cached_tokens > 500 and total.failed_steps > 10
    return total.ticks

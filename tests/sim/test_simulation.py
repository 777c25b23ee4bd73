"""Seeded runs of scheduler, cache and fake device: what must not change an answer, and the simulator itself.

The most of the ticks are in test_runs.py and test_more_runs.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from engine.scheduling.policy.registry import POLICIES
from tests.sim import __main__ as command
from tests.sim.simulator import SimulationError, Simulator, run, simulate
from tests.sim.workload import BUDGETS, Options, calm_options, draw_arrivals, draw_options

# Prompts that come back when the cache has lost them.
TIERED = {
    "page_size": 2, "windows": (None,), "num_snapshots": None, "prefix_caching": True, "num_pages": 40,
    "max_model_len": 24, "burst": 4, "arrival_rate": 0.5, "alphabet": 1, "max_adapters": 0, "namespaces": 2,
    "tier_pages": 200, "depth": 2, "host_pages": 0, "has_disk": True,
}  # fmt: skip


def test_pages_come_from_a_tier() -> None:
    """While steps run, and too late, and for those who have left."""
    assert sum([simulate(seed, **TIERED).received_tokens for seed in range(8)]) > 50
    hasty = TIERED | {"tier_timeout_s": 0.02, "abort_rate": 0.1, "fail_rate": 0.05, "vocab_size": 40}
    assert sum([simulate(seed, **hasty).received_tokens for seed in range(8)]) > 5
    hanging = TIERED | {"tier_timeout_s": 0.02, "tier_eagerness": 0.02, "ticks": 300, "abort_rate": 0.02}
    assert sum([simulate(seed, **hanging).given_up for seed in range(8)]) > 2
    # States, windows, and both: what comes of them is worth nothing without the rest.
    for changes in ({"num_snapshots": 4}, {"windows": (None, 9, 4), "num_pages": 120}, {"windows": (4,)}):
        both = TIERED | {"ticks": 60} | changes
        assert sum([simulate(seed, **both).received_tokens for seed in range(4)]) > 5
    slow = hasty | {
        "tier_timeout_s": 0.1,
        "tier_eagerness": 0.9,
        "windows": (None, 4),
        "num_snapshots": 3,
        "num_pages": 90,
        "ticks": 60,
    }
    assert sum([simulate(seed, **slow).received_tokens for seed in range(4)]) > 5
    # A grammar's first tokens are told while the prompt is in flight.
    ahead = TIERED | {"constrained_rate": 0.8, "jump_ahead": True, "eagerness": 0.0, "tier_eagerness": 0.9}
    ahead |= {"vocab_size": 40, "max_num_batched_tokens": 12, "max_num_seqs": 4}
    assert sum([simulate(seed, **ahead).received_tokens for seed in range(8)]) > 5


def test_pages_come_from_host_memory() -> None:
    """Some at once, of which there is little room, and what has left it from the tier below."""
    for changes in ({"has_disk": False, "host_pages": 60}, {"host_pages": 12}):
        host = TIERED | changes
        assert sum([simulate(seed, **host).received_tokens for seed in range(8)]) > 40
        hasty = host | {"tier_timeout_s": 0.02, "abort_rate": 0.1, "fail_rate": 0.05, "vocab_size": 40}
        assert sum([simulate(seed, **hasty).received_tokens for seed in range(8)]) > 2
        for more in (
            {"num_snapshots": 4, "host_pages": 30},
            {"windows": (None, 9, 4), "num_pages": 120},
            {"windows": (4,)},
        ):
            both = host | {"ticks": 60} | more
            assert sum([simulate(seed, **both).received_tokens for seed in range(4)]) > 2


Answers = dict[str, tuple[tuple[int, ...], str, object]]


def answers_of(seed: int, options: Options, ticks: list[int]) -> Callable[..., Answers]:
    """Gives the answers of one workload under changed options, each of which is run once. ticks: of each run."""
    done: dict[Options, Answers] = {}

    def answers(**changes: Any) -> Answers:
        changed = dataclasses.replace(options, **changes)
        if changed not in done:
            report = run(seed, changed, draw_arrivals(seed, options))
            done[changed] = report.answers
            ticks.append(report.ticks)
        return done[changed]

    return answers


@pytest.mark.parametrize("first", range(0, 40, 10))
def test_what_must_not_change_an_answer(first: int, record_property: Callable[[str, object], None]) -> None:
    """Depth, prefix cache, size of the pool, token budget, eviction, order: the same tokens for every request."""
    ticks: list[int] = []
    for seed in range(first, first + 10):
        options = calm_options(seed)
        whole_context = options.whole_context
        answers = answers_of(seed, options, ticks)
        plain = answers()
        assert len(plain) > 0 or not draw_arrivals(seed, options)
        assert answers(depth=1) == answers(depth=2) == plain
        assert answers(prefix_caching=False) == answers(prefix_caching=True) == plain
        tiny, big = whole_context, (options.max_num_seqs + 2) * whole_context
        if options.num_pages >= whole_context:
            assert answers(num_pages=tiny) == answers(num_pages=big) == plain
        assert answers(max_num_batched_tokens=options.max_num_seqs) == plain
        assert answers(max_draft_tokens=0) == plain
        for budgets in BUDGETS:
            assert answers(max_draft_tokens=6, draft_accuracy=0.9, budgets=budgets) == plain
        assert answers(eviction_policy="fifo") == plain
        assert answers(transfer_rate=0.0) == plain
        assert answers(jump_ahead=False) == answers(jump_ahead=True) == plain
        for policy in POLICIES:
            assert answers(policy=policy) == plain
    record_property("simulated_ticks", sum(ticks))


def test_many_culprits_beside_each_other() -> None:
    """The simulator looks that nobody else ends."""
    crowd = {
        "culprit_rate": 0.7, "fail_rate": 0.0, "max_num_seqs": 32, "max_num_batched_tokens": 400, "burst": 32,
        "arrival_rate": 0.5, "num_pages": 400, "windows": (None,), "spoil_rate": 0.0, "vocab_size": 40,
    }  # fmt: skip
    assert sum([simulate(seed, **crowd).guilty for seed in range(12)]) > 200


def test_a_run_is_a_function_of_its_seed() -> None:
    for seed in range(5):
        assert simulate(seed) == simulate(seed)


def test_seeds_differ() -> None:
    drawn = [draw_options(seed) for seed in range(200)]
    assert len(set(drawn)) == 200
    for field in dataclasses.fields(Options):
        assert len({getattr(options, field.name) for options in drawn}) > 1, field.name


def test_a_failure_says_how_to_repeat_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(self: Simulator) -> None:
        assert self.report.ticks < 20, "planted"

    monkeypatch.setattr(Simulator, "check", check)
    with pytest.raises(SimulationError, match=r"(?s)seed 3, tick 20.*planted.*python -m tests.sim --seed 3"):
        simulate(3)


def test_the_hunt_reports_failures(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["sim", "--seconds", "0.05", "--first", "0"])
    assert command.main() == 0
    assert "0 failed" in capsys.readouterr().out

    def check(self: Simulator) -> None:
        raise AssertionError("planted")

    monkeypatch.setattr(Simulator, "check", check)
    monkeypatch.setattr("sys.argv", ["sim", "--seconds", "60", "--first", "7"])
    assert command.main() == 1
    captured = capsys.readouterr()
    assert "python -m tests.sim --seed 7" in captured.err and "10 failed" in captured.out


def test_repeating_one_seed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["sim", "--seed", "3"])
    assert command.main() == 0
    assert "Report(ticks=" in capsys.readouterr().out

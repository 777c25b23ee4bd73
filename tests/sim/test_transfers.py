"""Prefill and decode apart in simulations, and that they catch planted bugs (see test_mutants.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from engine.lending import Lending
from engine.transfer.exchange import PageExchange, _Kept
from tests.sim.simulator import SimulationError, simulate
from tests.sim.test_mutants import MAX_SEEDS, UNMUTATED_SEEDS, Mutant, plant

# Most prompts come from another server, to whom there is enough to give.
APART: dict[str, Any] = {
    "page_size": 2, "windows": (None,), "num_snapshots": None, "prefix_caching": True, "num_pages": 80,
    "max_model_len": 24, "burst": 4, "arrival_rate": 0.5, "alphabet": 2, "max_adapters": 0, "namespaces": 2,
    "tier_pages": 0, "depth": 2, "transfer_rate": 0.8, "transfer_timeout_s": 1.0, "kept_share": 0.5, "pool_rate": 0.0,
    "transfer_eagerness": 0.5, "eagerness": 0.0, "ticks": 150, "vocab_size": 40,
}  # fmt: skip
HASTY = {"transfer_timeout_s": 0.03, "abort_rate": 0.1, "fail_rate": 0.05}
STATES = {"num_snapshots": 6}
WINDOWS = {"windows": (None, 9, 4), "num_pages": 200, "ticks": 100}
BOTH = {"windows": (None, 4), "num_snapshots": 6, "num_pages": 150}
ADAPTERS = {"max_adapters": 3, "adapter_rate": 0.8, "reload_rate": 0.05}
TIERED = {"tier_pages": 200, "host_pages": 0, "has_disk": True, "tier_eagerness": 0.5, "tier_timeout_s": 1.0}
TROUBLES: dict[str, tuple[dict[str, Any], int]] = {
    "plain": ({}, 300),
    "hasty": (HASTY, 50),
    "states": (STATES, 300),
    "failing-states": (STATES | HASTY, 30),
    "windows": (WINDOWS, 300),
    "one-window": ({"windows": (4,)}, 300),
    "both": (BOTH, 200),
    "adapters": (ADAPTERS, 300),
    "tiered": (TIERED, 300),
}


@pytest.mark.parametrize("name", TROUBLES)
def test_pages_come_from_another_server(name: str, record_property: Callable[[str, object], None]) -> None:
    changes, least = TROUBLES[name]
    reports = [simulate(seed, **APART | changes) for seed in range(UNMUTATED_SEEDS)]
    assert sum([report.transferred_tokens for report in reports]) > least
    record_property("simulated_ticks", sum([report.ticks for report in reports]))


MUTANTS = [
    Mutant(
        "an adapter's pages are anybody's", PageExchange, "_answer",
        "message.get(\"adapter\") != _adapter_of(kept.sequence)", "False", APART | ADAPTERS,
    ),
    Mutant(
        "another prompt's pages are taken", PageExchange, "_answer",
        "message.get(\"digest\") != _digest(tokens, (first + count) * self._page_size)", "False", APART,
    ),
    Mutant(
        "what went while it was read is believed", PageExchange, "_fetch",
        "closed.get(\"held\") is not True", "False", APART | HASTY | {"transfer_eagerness": 0.2},
    ),
    Mutant(
        "what was not read counts", PageExchange, "_fetch", "pages.num_shared, False", "end, False", APART | HASTY
    ),
    Mutant(
        "a state is filled that a step in flight names", PageExchange, "_fetch", "await committed", "pass",
        APART | STATES | {"transfer_eagerness": 0.9},
    ),
    Mutant("a state that went is given", _Kept, "is_there", "self.snapshot.is_there", "True", APART | STATES),
    Mutant("a pin stays", Lending, "unpin", "self.num_pinned -= 1", "pass", APART | STATES),
    Mutant(
        "a window comes short of a page", PageExchange, "_places",
        "group.behind(end * size, size)", "group.behind(end * size, size) + 1", APART | WINDOWS,
    ),
]  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_caught(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(mutant, monkeypatch)
    for seed in range(MAX_SEEDS):
        try:
            simulate(seed, **mutant.changes)
        except SimulationError:
            monkeypatch.undo()
            simulate(seed, **mutant.changes)
            return
    pytest.fail(f"no simulation out of {MAX_SEEDS} saw that {mutant.name}")

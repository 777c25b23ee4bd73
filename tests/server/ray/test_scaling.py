"""How many replicas, and what one takes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from engine.config import EngineConfig, StartupError
from server.ray.scaling import Replicas, max_ongoing, policy, replicas_for, resources


@pytest.mark.parametrize(
    ("current", "running", "waiting", "rows", "wanted"),
    [
        (1, 0, 0, 8, 1),  # idle
        (3, 0, 0, 8, 1),
        (1, 6, 0, 8, 1),  # 80% busy
        (1, 7, 0, 8, 2),
        (1, 8, 16, 8, 4),  # three replicas' work at 80%
        (2, 16, 0, 8, 3),
        (4, 8, 0, 8, 2),
        (2, 4, 4, 8, 4),  # rows are free, but the caches are full: twice what fits
        (2, 1, 100, 8, 16),
        (3, 5, 5, 0, 6),  # nobody has said how many rows there are
        (2, 0, 0, 0, 2),
    ],
)
def test_replicas(current: int, running: float, waiting: float, rows: float, wanted: int) -> None:
    assert replicas_for(current, running, waiting, rows) == wanted


def test_the_policy_counts_what_waits_in_serve() -> None:
    metrics: dict[str, dict[Any, float]] = {
        "running": {"a": 4.0, "b": 4.0},
        "waiting": {"a": 1.0, "b": 0.0},
        "rows": {"a": 4.0, "b": 4.0},
    }
    context = SimpleNamespace(current_num_replicas=2, total_queued_requests=7.0, aggregated_metrics=metrics)
    assert policy(context) == (5, {})
    started = SimpleNamespace(current_num_replicas=2, total_queued_requests=0.0, aggregated_metrics=None)
    assert policy(started) == (2, {})


@pytest.mark.parametrize(("text", "least", "most"), [("1", 1, 1), ("4", 4, 4), ("1..3", 1, 3), ("2..2", 2, 2)])
def test_counts_are_read(text: str, least: int, most: int) -> None:
    assert Replicas.parse(text) == Replicas(least, most)


@pytest.mark.parametrize("text", ["", "0", "0..2", "3..1", "-1", "1...3", "1..", "a", "1.5", "1..999999"])
def test_other_counts_are_refused(text: str) -> None:
    with pytest.raises(StartupError, match="--replicas"):
        Replicas.parse(text)


def test_what_waits_waits_in_serve() -> None:
    assert [max_ongoing(rows) for rows in (1, 4, 64, 256)] == [3, 6, 72, 288]


@pytest.mark.parametrize(
    ("ranks", "device", "gpus", "options", "bundles"),
    [
        (1, "auto", False, {"num_cpus": 2.0, "num_gpus": 0}, None),
        (1, "auto", True, {"num_cpus": 2.0, "num_gpus": 1}, None),
        (1, "cpu", True, {"num_cpus": 2.0, "num_gpus": 0}, None),
        (4, "cuda", True, {"num_cpus": 2.0, "num_gpus": 4}, [{"CPU": 4.0, "GPU": 4.0}]),
        (4, "cpu", False, {"num_cpus": 2.0, "num_gpus": 0}, [{"CPU": 4.0}]),
    ],
)
def test_ranks_share_one_bundle(
    ranks: int, device: str, gpus: bool, options: dict[str, float], bundles: list[dict[str, float]] | None
) -> None:
    found = resources(EngineConfig(device=device, tensor_parallel_size=ranks), 2.0, gpus)
    assert found["ray_actor_options"] == options and found.get("placement_group_bundles") == bundles
    assert (found.get("placement_group_strategy") == "STRICT_PACK") == (bundles is not None)
    # Serve takes the replica's own process from the first bundle.
    if bundles is not None:
        assert all(options[f"num_{name.lower()}s"] <= bundles[0][name] for name in bundles[0])

"""How many replicas there should be, and what one of them takes: pure functions, and the policy that Serve calls.

What the engines say is counted (rows that run, requests that wait), and what waits in Serve for a free replica. No Ray
in here: the policy reads the attributes of Serve's AutoscalingContext.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Protocol

from engine.config import EngineConfig, StartupError

# Of a replica's rows that should be busy: the rest is for bursts, while another one starts.
TARGET_UTILISATION = 0.8


@dataclass(frozen=True, slots=True)
class Replicas:
    """At least one, and at most so many."""

    least: int
    most: int

    @staticmethod
    def parse(text: str) -> Replicas:
        """Reads "3" and "1..3". Raises StartupError."""
        found = re.fullmatch(r"(\d{1,5})(?:\.\.(\d{1,5}))?", text)
        if found is None:
            raise StartupError(f"--replicas {text!r}: say a number, or the least and the most as 1..4")
        least = int(found[1])
        most = int(found[2] or found[1])
        if not 1 <= least <= most:
            raise StartupError(f"--replicas {text}: at least one, and the most not below the least")
        return Replicas(least, most)


def replicas_for(current: int, running: float, waiting: float, rows: float) -> int:
    """For what runs and waits in all replicas together. rows: of one replica, 0 where none has said.

    Where requests wait although there are rows, the KV caches are full: what runs is then all that fits.
    """
    work = running + waiting
    wanted = math.ceil(work / (rows * TARGET_UTILISATION) - 1e-9) if rows else current
    if waiting >= 1 and running > 0:
        wanted = max(wanted, min(math.ceil(current * work / running), 2 * current))
    return max(1, wanted)


class Context(Protocol):
    """What is read of Serve's AutoscalingContext."""

    current_num_replicas: int
    total_queued_requests: float
    aggregated_metrics: dict[str, dict[Any, float]] | None


def policy(context: Context) -> tuple[int, dict[str, Any]]:
    """A policy_function of Serve's AutoscalingPolicy, over what `record_autoscaling_stats` of the replicas says."""
    metrics = context.aggregated_metrics or {}
    total = {name: sum(metrics.get(name, {}).values()) for name in ("running", "waiting")}
    rows = max(metrics.get("rows", {}).values(), default=0.0)
    waiting = total["waiting"] + (context.total_queued_requests or 0.0)
    return replicas_for(context.current_num_replicas, total["running"], waiting, rows), {}


def max_ongoing(rows: int) -> int:
    """Requests that Serve gives to one replica: what waits beyond these can still go to another.

    A few more than there are rows, so that the next batch is full; and a probe must not wait for a generation.
    """
    return rows + max(2, rows // 8)


def resources(config: EngineConfig, cpus: float, gpus: bool) -> dict[str, Any]:
    """Of a replica, as options of a Serve deployment. gpus: the cluster has them, or they were asked for.

    Ranks are children of the replica's process, so they need the machine that it is on and see the devices that it
    sees: one bundle, not one for each rank.
    """
    ranks = config.tensor_parallel_size
    uses = gpus and config.device != "cpu"
    options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": ranks if uses else 0}
    if ranks == 1:
        return {"ray_actor_options": options}
    bundle = {"CPU": max(cpus, float(ranks))} | ({"GPU": float(ranks)} if uses else {})
    return {
        "ray_actor_options": options,
        "placement_group_bundles": [bundle],
        "placement_group_strategy": "STRICT_PACK",
    }

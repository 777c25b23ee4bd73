"""A request router of Ray Serve that takes replicas in turn: what bench/routing_ray.py compares with."""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica


class RoundRobinRouter(RequestRouter):  # type: ignore[misc]
    """The next in turn, and the ones after it where that is full."""

    def initialize_state(self, **_: Any) -> None:
        """Called by Serve."""
        self._turn = 0

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Replicas in groups, best first. See RequestRouter."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        replicas = sorted(candidate_replicas, key=lambda replica: str(replica.replica_id.unique_id))
        self._turn += 1
        return [[replicas[(self._turn + index) % len(replicas)]] for index in range(len(replicas))]

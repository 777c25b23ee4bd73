"""Serve's request router for replicas of an engine: to where the prompt's beginning is cached, or the session was.

It runs in the process of who holds the handle (the front). What each replica has is known from `record_routing_stats`,
and from what this router itself has just sent; see prefixes.py for the order. Serve takes the first that has room.
"""

from __future__ import annotations

import time
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from server.ray.bridge import Ask
from server.ray.prefixes import Beginnings, Candidate, Sent, order, read_published, worth_waiting_for


class CacheAwareRouter(RequestRouter):  # type: ignore[misc]
    """request_router_kwargs: period_s, of the statistics; patience_s, how long a token is worth waiting for."""

    def initialize_state(self, period_s: float = 1.0, patience_s: float = 0.0005, **_: Any) -> None:
        """Called by Serve."""
        self._patience_s = patience_s
        # The controller asks for statistics, and tells the routers, in turns of its own.
        self._sent_for_s = 5 * period_s + 5.0
        self._sent: dict[str, Sent] = {}
        # What was published, as it came and as a set of names.
        self._published: dict[str, tuple[Any, frozenset[int]]] = {}

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Replicas in groups, best first. See RequestRouter."""
        ask = _ask_of(pending_request)
        if pending_request is None or ask is None:
            return [candidate_replicas]
        # Without it Serve would choose again at once, for as long as all are busy.
        pending_request.routing_context.should_backoff = True
        by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        if ask.keeper is not None and ask.keeper in by_id:
            return [[by_id[ask.keeper]]]
        candidates = [self._candidate(name, replica) for name, replica in by_id.items()]
        ranks = order(candidates, ask.beginnings)
        best, gain = worth_waiting_for(candidates, ask.beginnings)
        if time.time() - pending_request.created_at < gain * self._patience_s:
            ranks = [kept for rank in ranks if (kept := [name for name in rank if name in best])]
        return [[by_id[name] for name in rank] for rank in ranks]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: Any, result: Any) -> None:
        """Called by Serve once the replica has taken the request."""
        if (ask := _ask_of(pending_request)) is not None:
            self._sent.setdefault(replica_id.unique_id, Sent(self._sent_for_s)).add(_all_names(ask.beginnings))

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called by Serve."""
        super().update_replicas(replicas)
        alive = {replica.replica_id.unique_id for replica in replicas}
        for kept in (self._sent, self._published):
            for name in kept.keys() - alive:
                del kept[name]

    def _candidate(self, name: str, replica: RunningReplica) -> Candidate:
        stats = replica.routing_stats
        known = self._published.get(name)
        if known is None or known[0] is not stats:
            known = self._published[name] = (stats, read_published(stats))
        ongoing = self.replica_queue_len_cache.get(replica.replica_id)
        if ongoing is None:
            ongoing = stats.get("ongoing", 0)
        return Candidate(name, ongoing, (known[1], self._sent.get(name, ())))


def _ask_of(pending_request: PendingRequest | None) -> Ask | None:
    args = () if pending_request is None else pending_request.args
    return args[0] if args and isinstance(args[0], Ask) else None


def _all_names(beginnings: Beginnings) -> tuple[int, ...]:
    return beginnings.names if beginnings.session is None else (*beginnings.names, beginnings.session)

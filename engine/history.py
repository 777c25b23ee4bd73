"""CacheHistory: what the last requests brought, and what has been given up since; engine/misses.py explains by it.

Told by the Scheduler (who came) and the KVCache (what went), on the loop thread: an entry a request and an eviction,
bounded in number and bytes.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from engine.forward import Int32Array

if TYPE_CHECKING:
    from engine.cache.kv_cache import SequencePages
    from engine.cache.node import Node
    from engine.scheduling.sequence import Sequence

# Whose tokens are remembered: 4 bytes a token.
MAX_REQUESTS = 1024
MAX_BYTES = 16 * 1024 * 1024
MAX_EVICTIONS = 4096
MAX_EVICTED_BYTES = 4 * 1024 * 1024


@dataclass(slots=True)
class Visit:
    """One request as the cache saw it. data: int32 bytes of its prompt, later of its answer, too. Times in seconds.

    num_cached: tokens found at its first admission. num_matchable: tokens that it was looked up with (1 where each
    of its tokens has a part in the answer). num_known: of a model with windows or a state, tokens that were there.
    """

    request_id: str
    namespace: str
    data: bytes
    num_prompt: int
    num_matchable: int
    num_cached: int
    num_known: int
    admitted_at: float
    released_at: float | None = None


class Evicted(NamedTuple):
    """The end of a node's run went. at: seconds. data: its tokens."""

    at: float
    node: Node
    data: bytes


class CacheHistory:
    """See the module. now: seconds."""

    def __init__(self, page_size: int, now: Callable[[], float]) -> None:
        self.page_size = page_size
        self.visits: OrderedDict[str, Visit] = OrderedDict()
        self.evictions: deque[Evicted] = deque()
        self.flushed_at: float | None = None
        self._now = now
        self._num_bytes = 0
        self._evicted_bytes = 0

    def admitted(self, sequence: Sequence, pages: SequencePages) -> None:
        """For the first time, with what it found."""
        assert sequence.admitted_at is not None
        visit = Visit(
            sequence.request.request_id,
            sequence.request.cache_root,
            pages.data,
            sequence.num_prompt_tokens,
            len(sequence.matchable_ids),
            sequence.num_cached_tokens,
            pages.num_known * self.page_size,
            sequence.admitted_at,
        )
        if (former := self.visits.pop(visit.request_id, None)) is not None:
            self._num_bytes -= len(former.data)
        self.visits[visit.request_id] = visit
        self._num_bytes += len(visit.data)
        while len(self.visits) > MAX_REQUESTS or (self._num_bytes > MAX_BYTES and len(self.visits) > 1):
            self._num_bytes -= len(self.visits.popitem(last=False)[1].data)

    def released(self, request_id: str, token_ids: Int32Array) -> None:
        """It has given back its pages; token_ids: what it leaves behind, the answer included."""
        if (visit := self.visits.get(request_id)) is not None:
            visit.released_at = self._now()
            if visit.data and (added := token_ids.nbytes - len(visit.data)) > 0:
                self._num_bytes += added
                visit.data = token_ids.tobytes()

    def evicted(self, node: Node, data: bytes) -> None:
        self.evictions.append(Evicted(self._now(), node, data))
        self._evicted_bytes += len(data)
        while len(self.evictions) > MAX_EVICTIONS or (
            self._evicted_bytes > MAX_EVICTED_BYTES and len(self.evictions) > 1
        ):
            self._evicted_bytes -= len(self.evictions.popleft().data)

    def flushed(self) -> None:
        """Everything that nobody held went at once."""
        self.flushed_at = self._now()
        self.evictions.clear()
        self._evicted_bytes = 0

"""Receiving: pages that are lent to somebody who fills them from elsewhere, or reads them for somebody else.

The Scheduler is one. A sequence that receives is in no order and holds no slot; what arrives for it enters the radix
tree, where admission finds it as it finds every prefix. Lent pages are locked until they are given back.
"""

from __future__ import annotations

from engine.cache.kv_cache import SequencePages
from engine.scheduling.residents import Residents
from engine.scheduling.sequence import Sequence, SequenceStatus

# Of all pages, those that may be lent at once to be filled: what runs must go on.
RECEIVED_SHARE = 0.5


class Receiving(Residents):
    """See the module. `lent`: between `receive` or `keep` and `give_back`, with the private pages of each."""

    @property
    def lent(self) -> dict[SequencePages, int]:
        return self._lent

    def receive(self, sequence: Sequence) -> SequencePages | None:
        """Pages for the whole pages of its prompt, those that are cached first: pages.num_shared of them. None: too few
        are to be had just now."""
        cache = self.kv_cache
        pages = cache.begin(sequence.matchable_ids, sequence.request.cache_root)
        end = (sequence.num_prompt_tokens - 1) // self.limits.page_size
        missing = end - pages.num_shared
        most = int(self.limits.num_pages * RECEIVED_SHARE) - sum(self._lent.values())
        # As for admission: what runs shall be able to grow for a while.
        headroom = int(self.limits.num_pages * self.options.admission_watermark) if self.has_work else 0
        if missing > min(most, cache.num_available - headroom) or not cache.reserve(pages, end * self.limits.page_size):
            cache.release(pages, (), 0)
            return None
        committed = self._committed_step
        if any(self._named_until.get(page, committed) > committed for page in pages.pages[pages.num_shared :]):
            # Whoever fills them is in no order with the steps.
            cache.release(pages, (), 0)
            return None
        self._lent[pages] = missing
        return pages

    def keep(self, sequence: Sequence) -> SequencePages:
        """The cached pages of its prompt, locked; those from which a step in flight is yet to compute are left out."""
        cache, tokens, root = self.kv_cache, sequence.request.prompt_token_ids, sequence.request.cache_root
        pages = cache.begin(tokens, root)
        right = next((i for i, page in enumerate(pages.pages) if page in cache.unconfirmed), pages.num_shared)
        if right < pages.num_shared:
            cache.release(pages, (), 0)
            pages = cache.begin(tokens[: right * self.limits.page_size + 1], root)
        self._lent[pages] = 0
        return pages

    def give_back(self, pages: SequencePages, sequence: Sequence, num_tokens: int) -> None:
        """Nobody reads or writes them any more. Of a receiving one: the KV of num_tokens is right, and stays."""
        del self._lent[pages]
        self.kv_cache.release(pages, sequence.token_ids, num_tokens)

    def received(self, sequence: Sequence) -> None:
        """Its turn to wait has come, whether something arrived or not; nothing happens where it was ended meanwhile."""
        if sequence.status is SequenceStatus.RECEIVING:
            sequence.move(SequenceStatus.WAITING)
            self.num_receiving -= 1
            held = self._held is not None and sequence.order >= self._held_from
            # Queues are in order: it stands behind those who came while it received.
            sequence.order = self._next_order
            self._next_order += 1
            self._queue(sequence, held)

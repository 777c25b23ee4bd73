"""Lending: pages that are lent to somebody who fills them from elsewhere, or reads them for somebody else; of models
with a recurrent state snapshots, too.

Other servers (transfer/) and the tiers (tiers/) share one. What arrives for a sequence that receives enters the radix
tree, where admission finds it as it finds every prefix. Lent pages are locked until they are given back. Loop thread.
"""

from __future__ import annotations

from engine.cache.kv_cache import SequencePages
from engine.cache.node import Snapshot
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import Sequence

# Of all pages, those that may be lent at once to be filled: what runs must go on.
RECEIVED_SHARE = 0.5
# Of all snapshots, those that may be pinned at once: the others keep their places as they are used.
PINNED_SHARE = 0.5


class Lending:
    """See the module. lent: between `receive` or `keep` and `give_back`, with the private pages of each.

    is_unordered: steps in flight may read or write, as another's, pages or snapshots that are free by now; and pages of
    a path that is known may yet be computed anew.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.limits, self.kv_cache = scheduler.limits, scheduler.kv_cache
        self.once_committed = scheduler.once_committed
        self.lent: dict[SequencePages, int] = {}
        self.num_pinned = 0
        self.is_unordered = self.kv_cache.has_windows or self.limits.num_snapshots is not None
        self._scheduler = scheduler
        self._most = int(self.limits.num_pages * RECEIVED_SHARE)

    def may_receive(self, sequence: Sequence, num_pages: int) -> bool:
        """Whether `receive` could be had of so many pages if nobody else had any: else nothing is to be waited for."""
        pages, missing = self._begin(sequence, num_pages)
        self.kv_cache.release(pages, (), 0)
        return not missing or (missing <= self._most and self.limits.num_snapshots != 0)

    def receive(self, sequence: Sequence, num_pages: int) -> SequencePages | None:
        """Pages for the first num_pages of its prompt, those that are cached first: pages.num_shared of them; in groups
        with a window for what the end sees, and of a recurrent state a snapshot (pages.kept). None: too few are to be
        had just now.

        Where `is_unordered`, they may be filled `once_committed`; else at once.
        """
        cache, num_tokens = self.kv_cache, num_pages * self.limits.page_size
        pages, missing = self._begin(sequence, num_pages)
        # As for admission: what runs shall be able to grow for a while.
        scheduler = self._scheduler
        headroom = int(self.limits.num_pages * scheduler.options.admission_watermark) if scheduler.has_work else 0
        room = min(self._most - sum(self.lent.values()), cache.num_available - headroom)
        if missing > room or not cache.reserve(pages, num_tokens):
            cache.release(pages, (), 0)
            return None
        if self.limits.num_snapshots is not None and num_pages > pages.num_shared:
            snapshot = cache.save_private(pages, num_tokens)
            if not snapshot:
                cache.release(pages, (), 0)
                return None
            # Whose it was to be has lost it.
            scheduler.unsent.pop(snapshot, None)
        if not self.is_unordered and scheduler.may_write(pages.pages[pages.num_shared :]):
            # Whoever fills them is in no order with the steps.
            cache.release(pages, (), 0)
            return None
        self.lent[pages] = missing
        return pages

    def _begin(self, sequence: Sequence, num_pages: int) -> tuple[SequencePages, int]:
        """What is cached of its first num_pages, locked; and how many pages are missing."""
        pages = self.kv_cache.begin(sequence.matchable_ids, sequence.request.cache_root)
        self.kv_cache.skip(pages, num_pages)
        return pages, sum(max(0, num_pages - len(own)) for own in pages.lists)

    def keep(self, sequence: Sequence, num_tokens: int | None = None) -> SequencePages:
        """The cached pages of its prompt, or of the first num_tokens, locked; those from which a step in flight is yet
        to compute are left out. Where `is_unordered`, what they hold is right `once_committed`, if it is intact."""
        cache, tokens, root = self.kv_cache, sequence.request.prompt_token_ids, sequence.request.cache_root
        if num_tokens is not None:
            tokens = tokens[: num_tokens + 1]
        pages = cache.begin(tokens, root)
        right = next((i for i, page in enumerate(pages.pages) if page in cache.unconfirmed), pages.num_shared)
        if right < pages.num_shared:
            cache.release(pages, (), 0)
            pages = cache.begin(tokens[: right * self.limits.page_size + 1], root)
        self.lent[pages] = 0
        return pages

    def snapshots_of(self, pages: SequencePages) -> list[tuple[int, Snapshot]]:
        """On the way of lent pages: after how many of them each is. One may go: who reads it looks then whether it was
        there all the time."""
        unsent = self._scheduler.unsent
        return [(depth, one) for depth, one in self.kv_cache.snapshots_of(pages) if one.id not in unsent]

    def pin(self, snapshot: Snapshot) -> bool:
        """Nobody's state takes its place until `unpin`, but for a step that fails. False: too many are pinned."""
        if self.num_pinned >= int((self.limits.num_snapshots or 0) * PINNED_SHARE):
            return False
        self.num_pinned += 1
        self.kv_cache.pin(snapshot, 1)
        return True

    def unpin(self, snapshot: Snapshot) -> None:
        """After `pin`, which was True."""
        self.num_pinned -= 1
        self.kv_cache.pin(snapshot, -1)

    def give_back(self, pages: SequencePages, sequence: Sequence, num_tokens: int) -> None:
        """Nobody reads or writes them any more. Of a receiving one: the KV of num_tokens is right, and stays."""
        del self.lent[pages]
        self.kv_cache.release(pages, sequence.token_ids, num_tokens)

"""Receiving: pages that are lent to somebody who fills them from elsewhere, or reads them for somebody else; of models
with a recurrent state snapshots, too.

The Scheduler is one. A sequence that receives is in no order and holds no slot; what arrives for it enters the radix
tree, where admission finds it as it finds every prefix. Lent pages are locked until they are given back.
"""

from __future__ import annotations

from collections.abc import Callable

from engine.cache.kv_cache import SequencePages
from engine.cache.radix_tree import Snapshot
from engine.scheduling.residents import Residents
from engine.scheduling.sequence import Sequence, SequenceStatus

# Of all pages, those that may be lent at once to be filled: what runs must go on.
RECEIVED_SHARE = 0.5
# Of all snapshots, those that may be pinned at once: the others keep their places as they are used.
PINNED_SHARE = 0.5


class Receiving(Residents):
    """See the module. `lent`: between `receive` or `keep` and `give_back`, with the private pages of each."""

    @property
    def is_unordered(self) -> bool:
        """Steps in flight may read or write, as another's, pages or snapshots that are free by now; and pages of a path
        that is known may yet be computed anew."""
        return self.kv_cache.has_windows or self.limits.num_snapshots is not None

    @property
    def lent(self) -> dict[SequencePages, int]:
        return self._lent

    def once_committed(self, then: Callable[[], None]) -> None:
        """Call it when every step that is launched by now has ended: at once where none is in flight."""
        if self._committed_step == self._next_step - 1:
            then()
        else:
            self._who_waits.append((self._next_step - 1, then))

    def _tell_who_waits(self) -> None:
        while self._who_waits and self._who_waits[0][0] <= self._committed_step:
            self._who_waits.popleft()[1]()

    def may_receive(self, sequence: Sequence, num_pages: int) -> bool:
        """Whether `receive` could be had of so many pages if nobody else had any: else nothing is to be waited for."""
        cache = self.kv_cache
        pages = cache.begin(sequence.matchable_ids, sequence.request.cache_root)
        cache.skip(pages, num_pages)
        missing = sum(max(0, num_pages - len(own)) for own in pages.lists)
        cache.release(pages, (), 0)
        return not missing or (
            missing <= int(self.limits.num_pages * RECEIVED_SHARE) and self.limits.num_snapshots != 0
        )

    def receive(self, sequence: Sequence, num_pages: int | None = None) -> SequencePages | None:
        """Pages for the whole pages of its prompt, or the first num_pages, those that are cached first:
        pages.num_shared of them; in groups with a window for what the end sees, and of a recurrent state a snapshot
        (pages.kept). None: too few are to be had just now.

        Where `is_unordered`, they may be filled `once_committed`; else at once.
        """
        cache = self.kv_cache
        pages = cache.begin(sequence.matchable_ids, sequence.request.cache_root)
        end = (sequence.num_prompt_tokens - 1) // self.limits.page_size if num_pages is None else num_pages
        cache.skip(pages, end)
        missing = sum(max(0, end - len(own)) for own in pages.lists)
        most = int(self.limits.num_pages * RECEIVED_SHARE) - sum(self._lent.values())
        # As for admission: what runs shall be able to grow for a while.
        headroom = int(self.limits.num_pages * self.options.admission_watermark) if self.has_work else 0
        if missing > min(most, cache.num_available - headroom) or not cache.reserve(pages, end * self.limits.page_size):
            cache.release(pages, (), 0)
            return None
        if self.limits.num_snapshots is not None and end > pages.num_shared:
            snapshot = cache.save_private(pages, end * self.limits.page_size)
            if not snapshot:
                cache.release(pages, (), 0)
                return None
            # Whose it was to be has lost it.
            self._unsent = [(slot, other) for slot, other in self._unsent if other != snapshot]
        committed = self._committed_step
        if not self.is_unordered and any(
            self._named_until.get(page, committed) > committed for page in pages.pages[pages.num_shared :]
        ):
            # Whoever fills them is in no order with the steps.
            cache.release(pages, (), 0)
            return None
        self._lent[pages] = missing
        return pages

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
        self._lent[pages] = 0
        return pages

    def snapshots_of(self, pages: SequencePages) -> list[tuple[int, Snapshot]]:
        """On the way of lent pages: after how many of them each is. One may go: who reads it looks then whether it was
        there all the time."""
        unsent = {snapshot for _, snapshot in self._unsent}
        return [(depth, one) for depth, one in self.kv_cache.snapshots_of(pages) if one.id not in unsent]

    def pin(self, snapshot: Snapshot) -> bool:
        """Nobody's state takes its place until `unpin`, but for a step that fails. False: too many are pinned."""
        if self._num_pinned >= int((self.limits.num_snapshots or 0) * PINNED_SHARE):
            return False
        self._num_pinned += 1
        self.kv_cache.pin(snapshot, 1)
        return True

    def unpin(self, snapshot: Snapshot) -> None:
        """After `pin`, which was True."""
        self._num_pinned -= 1
        self.kv_cache.pin(snapshot, -1)

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

"""KVCache: the one owner of pages: the pool, the radix tree and the page lists of sequences.

Called by the Scheduler, and by the Engine to flush and to count, on the loop thread. A page is at any time free, in the
tree, private to one sequence, a duplicate that waits for `end_step`, or on a detached path that somebody still holds;
`check` says so.
A sequence has a page list in every memory group; all pages come from one pool. Snapshots of recurrent states have a
pool of their own; one is free, hangs in the tree, or is kept by a sequence for the time when it leaves.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from engine.cache.eviction.registry import make_eviction_policy
from engine.cache.node import TOKEN_BYTES, Node, Snapshot
from engine.cache.page_pool import PagePool
from engine.cache.radix_tree import RadixTree
from engine.cache.watch import CacheWatch
from engine.forward import NULL_PAGE, Int32Array
from engine.groups import MemoryGroup
from engine.history import CacheHistory

TokenIds = Sequence[int] | Int32Array


def _to_bytes(token_ids: TokenIds) -> bytes:
    """int32 bytes; 0.1 ns a token from an int32 array, 8 from a list (struct is 2 to 3 times faster than numpy)."""
    if isinstance(token_ids, np.ndarray):
        return token_ids.astype(np.int32, copy=False).tobytes()
    return struct.pack(f"{len(token_ids)}i", *token_ids)


class SequencePages:
    """Pages of one sequence in order, a list for each group. lists[g][: gone[g]] were given back (null pages stand for
    them); up to num_shared the rest belongs to the tree and is locked, behind that it is private.

    Lists of groups with a window may be shorter than the others, until the prompt is computed. Only KVCache writes it.
    """

    __slots__ = ("data", "gone", "kept", "lists", "namespace", "node", "num_known", "num_shared", "snapshot")

    def __init__(self, namespace: str, data: bytes, node: Node, num_groups: int) -> None:
        self.lists: list[list[int]] = [[] for _ in range(num_groups)]
        self.gone = [0] * num_groups
        self.num_shared = 0
        # Of models with a recurrent state: pages that the tree knew at `begin`, beyond what was usable, too; the
        # snapshot to go on from; and the one to leave behind, with the tokens that it is of.
        self.num_known = 0
        self.snapshot = 0
        self.kept: tuple[int, int] | None = None
        self.namespace = namespace
        self.data = data  # the tokens seen so far, so that no call converts a prompt again
        self.node: Node | None = node  # where the lock is; ends at num_shared. None once released

    @property
    def pages(self) -> list[int]:
        """Of the first group, which often is the only one."""
        return self.lists[0]

    @property
    def num_pages(self) -> int:
        """Pages in every group, those that were given back included: how far it can be computed."""
        return min([len(pages) for pages in self.lists])

    @property
    def num_held(self) -> int:
        """Pages of all groups."""
        return sum([len(pages) for pages in self.lists]) - sum(self.gone)


class KVCache:
    """`token_ids` are all tokens of a sequence from its first, ids known; from call to call they only grow."""

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        *,
        groups: Sequence[MemoryGroup] = (MemoryGroup(),),
        num_snapshots: int | None = None,
        enable_prefix_caching: bool = True,
        eviction_policy: str = "lru",
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.groups = groups
        self.has_windows = any(group.window is not None for group in groups)
        self.num_evicted_pages = 0
        self._caching = enable_prefix_caching
        self._eviction_policy = eviction_policy
        self._num_snapshots = num_snapshots
        self._now = now
        self._watch: CacheWatch | None = None
        # The group whose pages stand for all: everything is seen there for the longest time.
        self._told_group = next((i for i, group in enumerate(groups) if group.window is None), 0)
        self.rebuild()

    def rebuild(self) -> None:
        """Empty books: all that was cached is forgotten. No sequence may hold a page."""
        snapshots = self._num_snapshots
        self._pool = PagePool(self.num_pages)
        policy = make_eviction_policy(self._eviction_policy)
        self._tree = RadixTree(self.page_size, policy, self.groups, snapshots is not None)
        self._snapshots = PagePool(snapshots) if snapshots and self._caching else None
        self._deferred: list[int] = []
        # Of the first group: pages in the tree whose step has not ended yet.
        self.unconfirmed: set[int] = set()
        self.history = CacheHistory(self.page_size, self._now)
        self._tree.on_evicted = self.history.evicted
        if self._watch is not None:
            self._watch.cleared()
            self.watch(self._watch)

    def watch(self, watch: CacheWatch) -> None:
        """Tell it of all pages that others may find, from now on."""
        self._watch, self._pool.on_freed = watch, watch.freed

    @property
    def num_free(self) -> int:
        return self._pool.num_free

    @property
    def num_evictable(self) -> int:
        return self._tree.num_evictable

    @property
    def num_available(self) -> int:
        """Pages that `reserve` can get: free ones and evictable ones."""
        return self._pool.num_free + self._tree.num_evictable

    def begin(self, token_ids: TokenIds, namespace: str = "") -> SequencePages:
        """Lock the longest known prefix from which every group can go on; of whole pages, and one token short, for a
        step has to sample."""
        data = _to_bytes(token_ids) if self._caching else b""
        seq = SequencePages(namespace, data, self._tree.open(namespace), len(self.groups))
        if self._caching:
            assert seq.node is not None
            limit = (len(token_ids) - 1) // self.page_size
            seq.node, seq.lists, seq.gone, seq.num_known = self._tree.match(seq.node, data, limit)
            seq.num_shared = len(seq.lists[0])
            seq.snapshot = seq.node.snapshot.id if seq.node.snapshot is not None else 0
        return seq

    def match_length(self, token_ids: TokenIds, namespace: str = "") -> int:
        """Tokens that `begin` would find. Changes no order and locks nothing."""
        if not self._caching:
            return 0
        limit = (len(token_ids) - 1) // self.page_size
        return self._tree.match_length(namespace, _to_bytes(token_ids), limit) * self.page_size

    def num_missing(self, seq: SequencePages, num_tokens: int, ahead: int = 0) -> int:
        """Pages that must be had to bring a sequence to num_tokens, `ahead` tokens at a time (0: one by one).

        Of a group with a window only what it holds at once, for it gives back on the way.
        """
        end, missing = -(-num_tokens // self.page_size), 0
        for group, pages, gone in zip(self.groups, seq.lists, seq.gone, strict=True):
            most = group.most_pages(self.page_size) + -(-ahead // self.page_size)
            missing += max(0, min(end - gone, most) - (len(pages) - gone))
        return missing

    def make_room(self, num_pages: int) -> bool:
        """Have num_pages free pages, evicting what is missing; False, and no change, if it cannot.

        Optional before many `reserve_one`: one eviction for all of a step's pages is cheaper than one for each.
        """
        missing = num_pages - self._pool.num_free
        if missing > self._tree.num_evictable:
            return False
        if missing > 0:
            pages = self._tree.evict(missing)
            self.num_evicted_pages += len(pages)
            self._pool.free(pages)
        return True

    def reserve(self, seq: SequencePages, num_tokens: int, window_tokens: int | None = None) -> bool:
        """Make room for num_tokens with private pages, evicting as needed; False, and no change, if it cannot.

        window_tokens: what groups with a window shall have room for, where that is another number.
        """
        assert seq.node is not None, "the sequence was released"
        full, windowed = (
            -(-count // self.page_size)
            for count in (num_tokens, num_tokens if window_tokens is None else window_tokens)
        )
        missing = [
            max(0, (full if group.window is None else windowed) - len(pages))
            for group, pages in zip(self.groups, seq.lists, strict=True)
        ]
        if any(missing):
            if not self.make_room(sum(missing)):
                return False
            for pages, count in zip(seq.lists, missing, strict=True):
                pages += self._pool.allocate(count)
        return True

    def skip(self, seq: SequencePages, num_pages: int) -> None:
        """Before room is made for what comes from elsewhere, num_pages in all: of groups with a window nobody will read
        what stands before their last window."""
        self._leave_behind(seq, num_pages * self.page_size)

    def snapshots_of(self, seq: SequencePages) -> list[tuple[int, Snapshot]]:
        """Those on the path that a sequence holds, the deepest first, and after how many pages each is."""
        found, node, depth = [], seq.node, seq.num_shared
        while node is not None and node.parent is not None:
            if node.snapshot is not None:
                found.append((depth, node.snapshot))
            node, depth = node.parent, depth - node.length
        return found

    def reserve_one(self, seq: SequencePages) -> int:
        """One more private page in every group; its id in the first one, or 0 when too few are available."""
        assert seq.node is not None, "the sequence was released"
        lists = seq.lists
        if self._pool.num_free < len(lists) and not self.make_room(len(lists)):
            return 0
        for pages in lists:
            pages.append(self._pool.allocate_one())
        return lists[0][-1]

    def enter(self, seq: SequencePages, token_ids: TokenIds, num_tokens: int) -> list[tuple[int, int, int]]:
        """Give the whole pages of token_ids[:num_tokens] to the tree and lock them: a prefill is being launched.

        Returns (group, index, page id) for each page that the tree had already and that replaces the sequence's own.
        Those stay out of the pool until `end_step`, for the step under construction may still name them.
        """
        first = seq.num_shared
        duplicates, remaps = self._insert(seq, token_ids, num_tokens)
        self._deferred += duplicates
        others = {page for group, _, page in remaps if not group}
        self.unconfirmed.update(page for page in seq.pages[first : seq.num_shared] if page not in others)
        return remaps

    def confirm(self, seq: SequencePages, first: int, end: int) -> None:
        """The step that computed its pages from `first` to `end`, which it has entered, has succeeded."""
        self.unconfirmed.difference_update(seq.pages[first:end])
        if self._watch is not None and first < end and self.is_intact(seq):
            pages = seq.lists[self._told_group]
            before = pages[first - 1] if first else NULL_PAGE
            self._watch.stored(seq.namespace, seq.data, first, pages[first:end], before)

    def give_back(self, seq: SequencePages, num_computed: int) -> list[tuple[int, range]]:
        """No step to come reads what is behind the windows of token num_computed. Returns (group, indices) of what are
        null pages from now on.

        Private pages are free at once; shared ones stay in the tree for others, as long as their memory is not needed.
        """
        # Somebody can go on where the last page that is whole now ends, if the sequence leaves at this point; an
        # overrun, whose token is not known, may be of the page after it.
        start = max(0, num_computed - 1) // self.page_size * self.page_size
        assert start <= seq.num_pages * self.page_size, f"{num_computed} tokens in {seq.num_pages} pages"
        return self._leave_behind(seq, start)

    def _leave_behind(self, seq: SequencePages, num_tokens: int) -> list[tuple[int, range]]:
        """What is behind the windows of token num_tokens becomes null pages; returns (group, indices)."""
        assert seq.node is not None, "the sequence was released"
        returned: list[tuple[int, range]] = []
        for window, members in enumerate(self._tree.members):
            old = seq.gone[members[0]]
            new = self.groups[members[0]].behind(num_tokens, self.page_size)
            if new <= old:
                continue
            if old < seq.num_shared:
                assert not seq.node.detached, "a sequence that is not intact goes on"
                self._tree.leave(seq.node, seq.num_shared, window, old, new)
            for group in members:
                pages = seq.lists[group]
                self._pool.free(pages[max(old, seq.num_shared) : new])
                pages[old:new] = [NULL_PAGE] * (new - old)
                seq.gone[group] = new
                returned.append((group, range(old, new)))
        return returned

    def save_shared(self, seq: SequencePages, num_tokens: int) -> int:
        """A snapshot to save the state of a sequence to, which has just computed num_tokens, the end of a page that it
        shares: from the step on that saves it others may go on there. 0: none is to be had, or there is one."""
        assert seq.node is not None and num_tokens == seq.num_shared * self.page_size
        snapshot = self._take_snapshot() if seq.node.snapshot is None else 0
        if snapshot and not self._tree.attach(seq.node, seq.num_shared, num_tokens // self.page_size, snapshot):
            self._free_snapshots([snapshot])
            return 0
        return snapshot

    def save_private(self, seq: SequencePages, num_tokens: int) -> int:
        """The same for pages that it does not share yet. It hangs in the tree when the sequence leaves."""
        assert num_tokens % self.page_size == 0
        snapshot = seq.kept[0] if seq.kept is not None else self._take_snapshot()
        if snapshot:
            seq.kept = snapshot, num_tokens
        return snapshot

    def pin(self, snapshot: Snapshot, count: int) -> None:
        """See RadixTree.pin. O(1), as taking one is, however many are pinned."""
        self._tree.pin(snapshot, count)

    def _take_snapshot(self) -> int:
        if self._snapshots is None:
            return 0
        if self._tree.lost_snapshots:
            self._free_snapshots(self._tree.lost_snapshots)
            self._tree.lost_snapshots = []
        return self._snapshots.allocate_one() if self._snapshots.num_free else self._tree.oldest_snapshot()

    def _free_snapshots(self, snapshots: list[int]) -> None:
        assert self._snapshots is not None
        self._snapshots.free(snapshots)

    def end_step(self) -> list[int]:
        """The step is built: duplicates may be handed out again. Returns them; it, and a step in flight, name them."""
        duplicates, self._deferred = self._deferred, []
        if duplicates:
            self._pool.free(duplicates)
        return duplicates

    def release(self, seq: SequencePages, token_ids: TokenIds, num_tokens: int) -> None:
        """End of a sequence's hold on its pages: finished, retracted, or not admitted after `begin`.

        The whole pages of token_ids[:num_tokens] stay in the tree for others; 0 enters nothing, and so does a
        sequence that is not intact.
        """
        assert seq.node is not None, "the sequence was released before"
        if num_tokens and not seq.node.detached:
            first = seq.num_shared
            self._pool.free(self._insert(seq, token_ids, num_tokens)[0])
            self.confirm(seq, first, seq.num_shared)
        if seq.kept is not None:
            snapshot, at = seq.kept
            known = at <= min(num_tokens, seq.num_shared * self.page_size)
            if not known or not self._tree.attach(seq.node, seq.num_shared, at // self.page_size, snapshot):
                self._free_snapshots([snapshot])
            seq.kept = None
        for pages in self._own(seq):
            self._pool.free(pages)
        self._pool.free(self._tree.unlock(seq.node, seq.num_shared, seq.gone))
        seq.lists, seq.gone = [[] for _ in self.groups], [0] * len(self.groups)
        seq.num_shared, seq.data, seq.node = 0, b"", None

    def take_back(self, seq: SequencePages, first_page: int) -> None:
        """A step failed: the sequence's pages from index first_page on leave the tree, with all that stands on them.

        Locks stay: every sequence that held such a page, this one too, is no longer intact and is to be released.
        """
        assert seq.node is not None, "the sequence was released"
        self._pool.free(self._tree.detach(seq.node, seq.num_shared, first_page))

    def is_intact(self, seq: SequencePages) -> bool:
        """False once a page that the sequence shares was taken back: its KV is not to be trusted."""
        assert seq.node is not None, "the sequence was released"
        return not seq.node.detached

    def flush(self) -> int:
        """Drop every page that no sequence needs; returns how many."""
        self._tree.on_evicted = None
        if self._watch is not None and self.num_available == self.num_pages:
            self._watch.cleared()
        pages = self._tree.evict(self._tree.num_evictable)
        self._tree.on_evicted = self.history.evicted
        self.history.flushed()
        self._pool.free(pages)
        return len(pages)

    def roots(self) -> list[Node]:
        """Of the namespaces; to be read only."""
        return self._tree.roots()

    def is_free(self) -> npt.NDArray[np.bool_]:
        """bool [num_pages]: of the pages from 1 on; a copy."""
        return self._pool.all_free()

    def _own(self, seq: SequencePages) -> list[list[int]]:
        """The private pages by group."""
        return [pages[max(seq.num_shared, gone) :] for pages, gone in zip(seq.lists, seq.gone, strict=True)]

    def _insert(
        self, seq: SequencePages, token_ids: TokenIds, num_tokens: int
    ) -> tuple[list[int], list[tuple[int, int, int]]]:
        """Move whole pages of the sequence into the tree and its lock with them; returns the duplicates, and what
        stands in their place: (group, index, page id)."""
        node, first = seq.node, seq.num_shared
        end = num_tokens // self.page_size
        assert node is not None, "the sequence was released"
        assert end <= seq.num_pages, f"{num_tokens} tokens in {seq.num_pages} pages"
        if not self._caching or end <= first:
            return [], []
        if (known := len(seq.data) // TOKEN_BYTES) < num_tokens:
            seq.data += _to_bytes(token_ids[known:num_tokens])
        own = [pages[first:end] for pages in seq.lists]
        seq.node, canonical = self._tree.insert(node, seq.data, first, own, seq.gone)
        seq.num_shared = end
        duplicates: list[int] = []
        remaps: list[tuple[int, int, int]] = []
        for group, (mine, theirs) in enumerate(zip(own, canonical, strict=True)):
            seq.lists[group][first : first + len(theirs)] = theirs
            for index, (page, other) in enumerate(zip(mine, theirs, strict=False), first):
                if page != other:
                    duplicates.append(page)
                    remaps.append((group, index, other))
        return duplicates, remaps

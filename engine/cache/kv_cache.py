"""KVCache: the one owner of pages: the pool, the radix tree and the page lists of sequences.

Called by the Scheduler alone, on the loop thread. A page is at any time free, in the tree, private to one
sequence, a duplicate that waits for `end_step`, or on a detached path that somebody still holds; `check` says so.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from engine.cache.eviction.registry import make_eviction_policy
from engine.cache.page_pool import PagePool
from engine.cache.radix_tree import TOKEN_BYTES, Node, RadixTree
from engine.forward import NULL_PAGE, Int32Array

TokenIds = Sequence[int] | Int32Array


def _to_bytes(token_ids: TokenIds) -> bytes:
    """int32 bytes; 0.1 ns a token from an int32 array, 8 from a list (struct is 2 to 3 times faster than numpy)."""
    if isinstance(token_ids, np.ndarray):
        return token_ids.astype(np.int32, copy=False).tobytes()
    return struct.pack(f"{len(token_ids)}i", *token_ids)


class SequencePages:
    """Pages of one sequence in order: pages[:num_shared] belong to the tree and are locked, the rest are private.

    Where the model has a window, the first num_gone were given back (null pages stand for them), and then none is
    shared. is_private: its pages never enter the tree, or not any more. Only KVCache writes it.
    """

    __slots__ = ("data", "is_private", "namespace", "node", "num_gone", "num_shared", "pages")

    def __init__(self, namespace: str, data: bytes, node: Node, *, is_private: bool = False) -> None:
        self.pages: list[int] = []
        self.num_shared = 0
        self.num_gone = 0
        self.is_private = is_private
        self.namespace = namespace
        self.data = data  # the tokens seen so far, so that no call converts a prompt again
        self.node: Node | None = node  # where the lock is; ends at num_shared. None once released

    @property
    def own_pages(self) -> list[int]:
        """A copy of the private ones."""
        return self.pages[max(self.num_shared, self.num_gone) :]


class KVCache:
    """`token_ids` are all tokens of a sequence from its first, ids known; from call to call they only grow."""

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        *,
        enable_prefix_caching: bool = True,
        eviction_policy: str = "lru",
    ) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.num_evicted_pages = 0
        self._caching = enable_prefix_caching
        self._pool = PagePool(num_pages)
        self._tree = RadixTree(page_size, make_eviction_policy(eviction_policy))
        self._deferred: list[int] = []

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

    def begin(self, token_ids: TokenIds, namespace: str = "", *, private: bool = False) -> SequencePages:
        """Lock the longest known prefix; of whole pages, and one token short, for a step has to sample.

        private: it neither finds anything nor leaves anything for others.
        """
        data = _to_bytes(token_ids) if self._caching and not private else b""
        seq = SequencePages(namespace, data, self._tree.open(namespace), is_private=private)
        self.extend_match(seq, token_ids)
        return seq

    def match_length(self, token_ids: TokenIds, namespace: str = "") -> int:
        """Tokens that `begin` would find. Changes no order and locks nothing."""
        if not self._caching:
            return 0
        limit = (len(token_ids) - 1) // self.page_size
        return self._tree.match_length(namespace, _to_bytes(token_ids), limit) * self.page_size

    def extend_match(self, seq: SequencePages, token_ids: TokenIds) -> int:
        """Match on from where a sequence without private pages stands; returns the number of new pages."""
        node = seq.node
        assert node is not None, "the sequence was released"
        if not self._caching or seq.is_private or node.detached or len(seq.pages) > seq.num_shared:
            return 0
        limit = (len(token_ids) - 1) // self.page_size
        data = self._data(seq, token_ids, len(token_ids))
        seq.node, pages = self._tree.match(node, data, seq.num_shared, limit)
        seq.pages += pages
        seq.num_shared += len(pages)
        return len(pages)

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

    def reserve(self, seq: SequencePages, num_tokens: int) -> bool:
        """Make room for num_tokens with private pages, evicting as needed; False, and no change, if it cannot."""
        assert seq.node is not None, "the sequence was released"
        missing = -(-num_tokens // self.page_size) - len(seq.pages)
        if missing > 0:
            if not self.make_room(missing):
                return False
            seq.pages += self._pool.allocate(missing)
        return True

    def reserve_one(self, seq: SequencePages) -> int:
        """One more private page; its id, or 0 when nothing is available."""
        assert seq.node is not None, "the sequence was released"
        if not self._pool.num_free and not self.make_room(1):
            return 0
        page = self._pool.allocate_one()
        seq.pages.append(page)
        return page

    def enter(self, seq: SequencePages, token_ids: TokenIds, num_tokens: int) -> list[tuple[int, int]]:
        """Give the whole pages of token_ids[:num_tokens] to the tree and lock them: a prefill is being launched.

        Returns (index, page id) for each page that the tree had already and that replaces the sequence's own.
        Those stay out of the pool until `end_step`, for the step under construction may still name them.
        """
        first = seq.num_shared
        duplicates = self._insert(seq, token_ids, num_tokens)
        self._deferred += duplicates
        return [(i, seq.pages[i]) for i in range(first, first + len(duplicates))]

    def give_back(self, seq: SequencePages, num_pages: int) -> range:
        """No step to come reads the sequence's first num_pages. Returns the indices that now hold the null page.

        Private pages are free at once. Shared ones are unlocked when all of them are left behind, for the tree keeps
        whole prefixes; what follows is the sequence's alone from then on. What it entered must have been computed:
        a lock that is given up cannot be taken back by `take_back`.
        """
        assert seq.node is not None, "the sequence was released"
        first = seq.num_gone
        if num_pages <= max(first, seq.num_shared - 1):
            return range(0)
        assert num_pages <= len(seq.pages), f"{num_pages} of {len(seq.pages)} pages are given back"
        self._pool.free(seq.pages[max(first, seq.num_shared) : num_pages])
        if seq.num_shared:
            assert not seq.node.detached, "a sequence that is not intact goes on"
            root = self._tree.open(seq.namespace)
            self._pool.free(self._tree.unlock(seq.node))
            seq.node, seq.num_shared = root, 0
        seq.pages[first:num_pages] = [NULL_PAGE] * (num_pages - first)
        seq.num_gone, seq.is_private, seq.data = num_pages, True, b""
        return range(first, num_pages)

    def end_step(self) -> None:
        """The step is built: duplicates may be handed out again."""
        if self._deferred:
            self._pool.free(self._deferred)
            self._deferred.clear()

    def release(self, seq: SequencePages, token_ids: TokenIds, num_tokens: int) -> None:
        """End of a sequence's hold on its pages: finished, retracted, or not admitted after `begin`.

        The whole pages of token_ids[:num_tokens] stay in the tree for others; 0 enters nothing, and so does a
        sequence that is not intact.
        """
        assert seq.node is not None, "the sequence was released before"
        if num_tokens and not seq.node.detached:
            self._pool.free(self._insert(seq, token_ids, num_tokens))
        self._pool.free(seq.own_pages)
        self._pool.free(self._tree.unlock(seq.node))
        seq.pages, seq.num_shared, seq.num_gone, seq.data, seq.node = [], 0, 0, b"", None

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
        """Drop every page that no sequence holds; returns how many."""
        pages = self._tree.evict(self._tree.num_evictable)
        self._pool.free(pages)
        return len(pages)

    def _data(self, seq: SequencePages, token_ids: TokenIds, num_tokens: int) -> bytes:
        known = len(seq.data) // TOKEN_BYTES
        if known < num_tokens:
            seq.data += _to_bytes(token_ids[known:num_tokens])
        return seq.data

    def _insert(self, seq: SequencePages, token_ids: TokenIds, num_tokens: int) -> list[int]:
        """Move whole pages of the sequence into the tree and its lock with them; returns the duplicates."""
        node, first = seq.node, seq.num_shared
        end = num_tokens // self.page_size
        assert node is not None, "the sequence was released"
        assert end <= len(seq.pages), f"{num_tokens} tokens in {len(seq.pages)} pages"
        if not self._caching or seq.is_private or end <= first:
            return []
        data = self._data(seq, token_ids, num_tokens)
        own = seq.pages[first:end]
        seq.node, canonical = self._tree.insert(node, data, first, own)
        seq.pages[first : first + len(canonical)] = canonical
        seq.num_shared = end
        return own[: len(canonical)]

    def check(self, live: Iterable[SequencePages]) -> None:
        """Assert that every page has one owner and that locks, tree and eviction order agree. O(pages).

        `live` are all sequences between begin and release.
        """
        owners: dict[int, str] = {}

        def own(pages: list[int], owner: str) -> None:
            for page in pages:
                assert page not in owners, f"page {page} belongs to {owners[page]} and to {owner}"
                owners[page] = owner

        own(self._pool.free_pages(), "the free list")
        own(self._deferred, "the deferred duplicates")
        nodes = list(self._tree.nodes())
        for node in nodes:
            own(node.pages, "the tree")
        locks: Counter[Node] = Counter()
        detached: set[Node] = set()
        for seq in live:
            assert seq.node is not None, "a released sequence is called live"
            own(seq.own_pages, "a sequence")
            assert not seq.num_gone or (seq.is_private and not seq.num_shared), "pages are gone under shared ones"
            assert not any(seq.pages[: seq.num_gone]), "a page that was given back is still named"
            path: list[Node] = []
            place: Node | None = seq.node
            while place is not None:
                path.append(place)
                place = place.parent
            locks.update(path)
            shared = [page for node in reversed(path) for page in node.pages]
            assert shared == seq.pages[: seq.num_shared], f"shared pages {seq.pages[: seq.num_shared]}, path {shared}"
            for node in path:
                if node.detached and node not in detached:
                    detached.add(node)
                    own(node.pages, "a detached path")
        missing = sorted(set(range(1, self.num_pages + 1)) - owners.keys())
        assert not missing and len(owners) == self.num_pages, f"pages without owner: {missing}"
        for node in [*self._tree.roots(), *nodes, *detached]:
            held = locks.pop(node, 0)
            assert node.lock_count == held, f"a node with {held} locks counts {node.lock_count}"
        assert not locks, "a sequence holds a node that is not in the tree"
        self._check_tree(nodes)

    def _check_tree(self, nodes: list[Node]) -> None:
        page_bytes = self.page_size * TOKEN_BYTES
        for node in nodes:
            assert node.pages and not node.detached, "a node of the tree is empty or detached"
            assert len(node.tokens) >= len(node.pages) * page_bytes, "a run has more pages than tokens"
            assert node.parent is not None and node.parent.children[node.key] is node, "parent and child disagree"
            assert node.key == node.tokens[:page_bytes], "a child is not under its first page"
        for root in self._tree.roots():
            assert root.lock_count or root.children, "a bare root was not dropped"
        unlocked = {node for node in nodes if not node.lock_count}
        evictable = sum(len(node.pages) for node in unlocked)
        assert self.num_evictable == evictable, f"{evictable} pages are evictable, counted {self.num_evictable}"
        gone: set[Node] = set()
        for node in self._tree.policy.order():
            assert node in unlocked and node not in gone, "the eviction order holds a node that is locked or twice"
            assert gone.issuperset(node.children.values()), "the eviction order has a parent before its child"
            gone.add(node)
        assert gone == unlocked, f"{len(unlocked - gone)} unlocked nodes are not in the eviction order"

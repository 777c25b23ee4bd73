"""Books: whether the KV cache's are in order. Every page has one owner; locks, tree and eviction orders agree.

The simulator asks after its steps, and the Engine while nobody is here: books that are wrong are begun anew, and
requests go on. Reads what is KVCache's own and changes nothing of it.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from random import Random

from engine.cache.kv_cache import KVCache, SequencePages
from engine.cache.node import TOKEN_BYTES, Node
from engine.clock import Clock
from engine.metrics import EngineMetrics

logger = logging.getLogger("oneloop.engine")

# Seconds between two looks at a part of the books.
CHECK_EVERY_S = 30.0
# A root may have very many.
MAX_CHILDREN_LOOKED_AT = 64


class Books:
    """Looks now and then, at a part of them. whole: each time, and at all of them."""

    def __init__(self, cache: KVCache, clock: Clock, metrics: EngineMetrics, whole: bool) -> None:
        self.checked_at = -math.inf
        self._cache, self._clock, self._metrics, self._whole = cache, clock, metrics, whole
        self._random = Random(0)  # its own: seeds of requests do not depend on when it was idle

    def look(self) -> None:
        """While no sequence holds a page."""
        now = self._clock.now()
        if not (self._whole or now - self.checked_at >= CHECK_EVERY_S):
            return
        self.checked_at = now
        try:
            if self._whole:
                check(self._cache, [])
            else:
                check_sample(self._cache, self._random)
        except Exception:
            logger.exception("the KV cache's books are wrong; it is emptied, and requests go on")
            self._metrics.kv_violations += 1
            self._cache.rebuild()


def check(cache: KVCache, live: Iterable[SequencePages]) -> None:
    """Assert that every page has one owner and that locks, tree and eviction order agree. O(pages).

    `live` are all sequences between begin and release.
    """
    owners: dict[int, str] = {}

    def own(pages: list[int], owner: str) -> None:
        added = dict.fromkeys(pages, owner)
        if len(added) < len(pages) or not owners.keys().isdisjoint(added):
            page = next(page for page, count in Counter([*owners, *pages]).items() if count > 1)
            raise AssertionError(f"page {page} belongs to {owners.get(page, owner)} and to {owner}")
        owners.update(added)

    live = list(live)
    own(cache._pool.free_pages(), "the free list")
    own(cache._deferred, "the deferred duplicates")
    nodes = list(cache._tree.nodes())
    for node in nodes:
        own(_pages_of(node), "the tree")
    locks: Counter[Node] = Counter()
    needed: defaultdict[tuple[Node, int], Counter[int]] = defaultdict(Counter)  # by first page, in a window
    detached: set[Node] = set()
    for seq in live:
        assert seq.node is not None, "a released sequence is called live"
        for pages in cache._own(seq):
            own(pages, "a sequence")
        path: list[Node] = []
        place: Node | None = seq.node
        while place is not None:
            path.append(place)
            place = place.parent
        locks.update(path)
        path.reverse()
        start = 0
        for node in path:
            for window, members in enumerate(cache._tree.members):
                first = max(0, seq.gone[members[0]] - start)
                if first < node.length:
                    needed[node, window][first] += 1
            start += node.length
            if node.detached and node not in detached:
                detached.add(node)
                own(_pages_of(node), "a detached path")
        for group, (pages, gone) in enumerate(zip(seq.lists, seq.gone, strict=True)):
            shared = [page for node in path for page in node.runs[group]]
            assert len(shared) == seq.num_shared, f"{seq.num_shared} shared pages on a path of {len(shared)}"
            assert shared[gone:] == pages[gone : seq.num_shared], f"shared pages {pages}, {gone} gone, path {shared}"
            assert not any(pages[:gone]), "a page that was given back is still named"
            assert all(pages[gone:]), "a page that was not given back is not named"
    missing = sorted(set(range(1, cache.num_pages + 1)) - owners.keys())
    assert not missing and len(owners) == cache.num_pages, f"pages without owner: {missing}"
    for node in [*cache._tree.roots(), *nodes, *detached]:
        held = locks.pop(node, 0)
        assert node.lock_count == held, f"a node with {held} locks counts {node.lock_count}"
        for part in node.parts:
            counts: dict[int, int] = needed.get((node, part.window), {})
            assert part.locks == counts, f"windows need {counts} of a node, which counts {part.locks}"
    assert not locks, "a sequence holds a node that is not in the tree"
    if cache._snapshots is not None:
        hanging = [node.snapshot for node in nodes if node.snapshot is not None]
        assert {snapshot.node for snapshot in hanging} == {node for node in nodes if node.snapshot is not None}
        assert set(cache._tree.snapshots()) == set(hanging), "the order of snapshots is wrong"
        ids = [snapshot.id for snapshot in hanging] + [seq.kept[0] for seq in live if seq.kept is not None]
        ids += cache._tree.lost_snapshots + cache._snapshots.free_pages()
        assert sorted(ids) == list(range(1, len(ids) + 1)), f"snapshots {sorted(ids)}"
        assert len(ids) == cache._snapshots.num_pages, "a snapshot was lost"
    _check_tree(cache, nodes)


def check_sample(cache: KVCache, random: Random, most: int = 256) -> None:
    """What `check` says, of `most` nodes on random ways down the tree, while no sequence holds a page."""
    available = cache.num_available
    assert available == cache.num_pages, f"{cache.num_pages - available} pages are neither free nor evictable"
    page_bytes, roots = cache.page_size * TOKEN_BYTES, cache._tree.roots()
    while roots and most > 0:
        node = random.choice(roots)
        while node.children and most > 0:
            key, child = random.choice(list(itertools.islice(node.children.items(), MAX_CHILDREN_LOOKED_AT)))
            assert child.parent is node and child.key == key, "parent and child disagree"
            assert child.key == child.tokens[:page_bytes], "a child is not under its first page"
            assert not child.lock_count and not child.detached, "a node is held, but nobody is there"
            pages = _pages_of(child)
            assert not any(map(cache._pool.is_free, pages)), "a page of the tree is free"
            assert len(pages) == len(set(pages)), "a page stands twice in a node"
            node, most = child, most - 1
        most -= 1


def _check_tree(cache: KVCache, nodes: list[Node]) -> None:
    page_bytes = cache.page_size * TOKEN_BYTES
    evictable = 0
    for node in nodes:
        assert node.length and not node.detached, "a node of the tree is empty or detached"
        assert all(len(run) == node.length for run in node.runs), "groups have runs of different lengths"
        assert len(node.tokens) >= node.length * page_bytes, "a run has more pages than tokens"
        assert node.parent is not None and node.parent.children[node.key] is node, "parent and child disagree"
        assert node.key == node.tokens[:page_bytes], "a child is not under its first page"
        assert node.children or node.lock_count or any(map(any, node.runs)), "a leaf without pages was not dropped"
        for group, run in zip(cache.groups, node.runs, strict=True):
            assert group.window is not None or all(run), "a hole where everything is seen"
            evictable += len(run) * (group.window is None and not node.lock_count)
        for part, members in zip(node.parts, cache._tree.members, strict=True):
            assert part.free_to == min(part.locks, default=node.length) and part.hole <= part.free_to
            for run in (node.runs[group] for group in members):
                assert not any(run[: part.hole]) and all(run[part.hole :]), f"a hole of {part.hole} in {run}"
            evictable += (part.free_to - part.hole) * len(members)
    for root in cache._tree.roots():
        assert root.lock_count or root.children, "a bare root was not dropped"
    assert cache.num_evictable == evictable, f"{evictable} pages are evictable, counted {cache.num_evictable}"
    unlocked = {node for node in nodes if not node.lock_count}
    gone: set[Node] = set()
    for node in cache._tree.policy.order():
        assert node in unlocked and node not in gone, "the eviction order holds a node that is locked or twice"
        assert not node.children or gone.issuperset(node.children.values()), (
            "the eviction order has a parent before its child"
        )
        gone.add(node)
    assert gone == unlocked, f"{len(unlocked - gone)} unlocked nodes are not in the eviction order"
    for window in range(len(cache._tree.members)):
        order = cache._tree.parts_in_order(window)
        parts = {part for node in nodes for part in node.parts if part.window == window}
        assert set(order) == {part for part in parts if part.hole < part.free_to}, "a window's order is wrong"
        assert len(set(order)) == len(order), "a window's order holds a part twice"
        assert [part.used for part in order] == sorted(part.used for part in order), "a window's order is no order"


def _pages_of(node: Node) -> list[int]:
    return [page for run in node.runs for page in run if page]

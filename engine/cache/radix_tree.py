"""RadixTree: which pages hold the KV of which token prefix. Owned and called by KVCache alone.

An edge holds a run of whole pages of every memory group and its tokens as one bytes object, so a match costs one dict
look-up and one memcmp per node, not per page. Reading starts at a locked place: `open` locks a namespace's root,
`match` and `insert` move that lock deeper, `unlock` gives the whole path back. Nodes without locks are in the eviction
policy's order. The tree never frees: it returns page ids, and its owner gives them to the pool.

Groups with a window need the end of a path alone. So a lock names the first page that it needs of such a group, and
what stands before all of them may go by itself, from the front of a node: a hole (null pages). A match ends where no
window looks into a hole. Models with a recurrent state go on only where a snapshot of it hangs at the end of a node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from engine.cache.eviction.base import EvictionPolicy
from engine.cache.eviction.ring import Ring, insert_before, unlink
from engine.cache.node import TOKEN_BYTES, Node, Part, Runs, Snapshot
from engine.forward import NULL_PAGE
from engine.groups import MemoryGroup


class Match(NamedTuple):
    """A path that was found and locked.

    node: ends there, split off if that was amid a run. runs: the pages on the way, null pages for the first gone[g] of
    group g, which its window does not see. known: of a model with windows or a state, pages of the same tokens in the
    tree, whether anybody can go on there or not.
    """

    node: Node
    runs: Runs
    gone: list[int]
    known: int


class RadixTree:
    """`data` is always the int32 bytes of a prompt from its first token; `depth` counts pages from there.

    gone: by group, the pages at the front that who asks has given back.
    """

    def __init__(
        self,
        page_size: int,
        policy: EvictionPolicy,
        groups: Sequence[MemoryGroup] = (MemoryGroup(),),
        has_state: bool = False,
    ) -> None:
        self.num_evictable = 0  # pages that `evict` can get
        self.policy = policy
        # Told what goes: the tokens that a node loses from its end.
        self.on_evicted: Callable[[Node, bytes], None] | None = None
        self.groups = groups
        self._page_size = page_size
        self._page_bytes = page_size * TOKEN_BYTES
        self._roots: dict[bytes, Node] = {}
        self._ticks = 0
        self._num_full = sum(group.window is None for group in groups)
        windows = dict.fromkeys(group.window for group in groups if group.window is not None)
        # By window: its groups, and the parts of which something may go, the one left behind first at the old end.
        self.members = [[i for i, group in enumerate(groups) if group.window == window] for window in windows]
        self._orders: list[Ring[Part]] = [Ring() for _ in windows]
        self._has_state = has_state
        self._snapshots: Ring[Snapshot] = Ring()
        self._pinned: Ring[Snapshot] = Ring()
        # Ids whose nodes have gone or changed; KVCache collects them.
        self.lost_snapshots: list[int] = []

    def open(self, namespace: str) -> Node:
        """Lock the root of a namespace, which lives while it is locked or has children."""
        key = namespace.encode(errors="surrogatepass")
        root = self._roots.get(key)
        if root is None:
            root = self._roots[key] = Node(None, key, b"", [[] for _ in self.groups])
        root.lock_count += 1
        return root

    def match(self, root: Node, data: bytes, limit: int) -> Match:
        """Move a lock from `root` to the deepest end from which every group can go on, `limit` pages at most."""
        path, length, known = self._usable(root, data, limit)
        cut = None
        if path and length < path[-1].length:
            cut = path[-1] = self._split(path[-1], length)
        depth = sum([node.length for node in path])
        gone = [group.behind(depth * self._page_size, self._page_size) for group in self.groups]
        self._lock(path, 0, gone, cut)
        runs: Runs = [[] for _ in self.groups]
        for node in path:
            for pages, run in zip(runs, node.runs, strict=True):
                pages += run
        for pages, count in zip(runs, gone, strict=True):
            pages[:count] = [NULL_PAGE] * count
        end = path[-1] if path else root
        if end.snapshot is not None:
            self._use(end.snapshot)
        return Match(end, runs, gone, known)

    def match_length(self, namespace: str, data: bytes, limit: int) -> int:
        """Pages that `match` would find from the root; changes nothing."""
        root = self._roots.get(namespace.encode(errors="surrogatepass"))
        if root is None:
            return 0
        path, length, _ = self._usable(root, data, limit)
        return sum([node.length for node in path[:-1]], length)

    def insert(self, node: Node, data: bytes, depth: int, own: Runs, gone: Sequence[int] = ()) -> tuple[Node, Runs]:
        """Move a lock from `node`, which ends at `depth`, to the end of `own`, which are data's pages from there on.

        Returns that end and the canonical pages: what the tree had already, in place of as many of the first of `own`.
        Those that differ are duplicates for the caller to free; the rest of `own` belong to the tree, which also fills
        its holes with them.
        """
        assert not node.detached, "insert below a node that was detached"
        end = depth + len(own[0])
        path, length = self._walk(node, data, depth, end)
        cut = None
        if path and length < path[-1].length:
            cut = path[-1] = self._split(path[-1], length)
        self._lock(path, depth, gone, cut)
        canonical: Runs = [[] for _ in own]
        start = depth
        for node in path:
            for part in node.parts:
                if part.hole:
                    self._fill(part, start, own, depth, gone)
            for pages, run in zip(canonical, node.runs, strict=True):
                pages += run
            start += node.length
        for members in self.members:
            for group in members:
                if (count := min(gone[group], start) - depth) > 0:
                    canonical[group][:count] = [NULL_PAGE] * count
        if start < end:
            node = self._add_leaf(node, data, start, end, [pages[start - depth :] for pages in own], gone)
        return node, canonical

    def _add_leaf(self, parent: Node, data: bytes, start: int, end: int, runs: Runs, gone: Sequence[int]) -> Node:
        """Locked once."""
        tokens = data[start * self._page_bytes : end * self._page_bytes]
        leaf = Node(parent, tokens[: self._page_bytes], tokens, runs)
        leaf.lock_count = leaf.hits = 1
        self._ticks += 1
        leaf.entered = self._ticks
        for window, members in enumerate(self.members):
            hole = max(0, min(gone[members[0]], end) - start)
            part = Part(leaf, window, hole, hole)
            if hole < leaf.length:
                part.locks[hole] = 1
            leaf.parts.append(part)
        parent.children[leaf.key] = leaf
        return leaf

    def leave(self, node: Node, depth: int, window: int, old: int, new: int) -> None:
        """Who holds a lock at `node` (which ends at `depth`) needs pages `old` to `new` of a window no more."""
        self._ticks += 1
        for place, start in self._path(node, depth, old):
            if start < new:
                part = place.parts[window]
                if new < start + place.length:
                    self._hold(part, new - start)
                self._drop(part, max(0, old - start))

    def unlock(self, node: Node, depth: int = 0, gone: Sequence[int] = ()) -> list[int]:
        """Give back the lock at `node` and so on the path to it. Returns the pages of detached nodes to free."""
        self._ticks += 1
        freed: list[int] = []
        if self.members:
            firsts = [gone[members[0]] for members in self.members]
            # From the front on, so that the end, where somebody may go on, is the youngest.
            for place, start in self._path(node, depth, min(firsts)):
                for part, first in zip(place.parts, firsts, strict=True):
                    if first < start + place.length:
                        freed += self._drop(part, max(0, first - start))
        while node.parent is not None:
            assert node.lock_count > 0, "unlock of a node that is not locked"
            node.lock_count -= 1
            if not node.lock_count:
                if node.detached:
                    freed += self._full_pages(node)
                elif not node.children and self._is_bare(node):
                    node.detached = True
                    self._lose_snapshot(node)
                    del node.parent.children[node.key]
                else:
                    self.num_evictable += self._num_full * node.length
                    node.used = self._ticks
                    self.policy.add(node)
            node = node.parent
        assert node.lock_count > 0, "unlock of a root that is not locked"
        node.lock_count -= 1
        self._drop_bare_root(node)
        return freed

    # ---- snapshots

    def attach(self, node: Node, depth: int, at: int, snapshot_id: int) -> bool:
        """Hang a snapshot at page `at` on the path of a locked node, which ends at `depth`; False where one is."""
        while at <= depth - node.length:
            depth -= node.length
            assert node.parent is not None
            node = node.parent
        if node.detached or node.parent is None:
            return False
        if at < depth:
            node = self._split(node, node.length - (depth - at))
        if node.snapshot is not None:
            return False
        node.snapshot = Snapshot(node, snapshot_id)
        self._snapshots.add(node.snapshot)
        return True

    def oldest_snapshot(self) -> int:
        """Take the one off that was loaded longest ago and is not pinned; 0 if there is none."""
        snapshot = self._snapshots.oldest()
        if snapshot is None:
            return 0
        unlink(snapshot)
        snapshot.node.snapshot = None
        return snapshot.id

    def pin(self, snapshot: Snapshot, count: int) -> None:
        """1: for somebody who loads it later; -1: that one has, or never will, and it may have gone meanwhile."""
        snapshot.pins += count
        if snapshot.is_there:
            self._use(snapshot)

    def _use(self, snapshot: Snapshot) -> None:
        unlink(snapshot)
        (self._pinned if snapshot.pins else self._snapshots).add(snapshot)

    def _lose_snapshot(self, node: Node) -> None:
        if node.snapshot is not None:
            unlink(node.snapshot)
            self.lost_snapshots.append(node.snapshot.id)
            node.snapshot = None

    # ---- eviction

    def evict(self, num_pages: int) -> list[int]:
        """Take num_pages unlocked pages out, fewer if there are no more, and some more where groups go together.

        Of the policy's victim, which gives its tail first, and the part that was left behind first, the one that was
        in use longer ago goes. At the same age the leaf does: it has just as little use, and others stand on the part.
        """
        freed: list[int] = []
        while (missing := num_pages - (before := len(freed))) > 0:
            node, part = self.policy.victim(), self._oldest_part()
            if part is not None and (node is None or part.used < node.used):
                freed += self._evict_part(part, missing)
            elif node is not None:
                freed += self._evict_leaf(node, missing)
            else:
                break
            assert len(freed) > before, "a victim of eviction had nothing to give"
        return freed

    def _oldest_part(self) -> Part | None:
        parts = [part for order in self._orders if (part := order.oldest()) is not None]
        return min(parts, key=lambda part: part.used) if parts else None

    def _evict_part(self, part: Part, num_pages: int) -> list[int]:
        freed = self._punch(part, min(part.free_to - part.hole, -(-num_pages // len(self.members[part.window]))))
        self.num_evictable -= len(freed)
        if part.hole == part.free_to:
            unlink(part)
        node = part.node
        if not node.lock_count and not node.children and self._is_bare(node):
            self._remove(node)
        return freed

    def _evict_leaf(self, node: Node, num_pages: int) -> list[int]:
        assert not node.children and not node.lock_count, "the victim is in use"
        runs, length, count = node.runs, node.length, 0
        taken = 0 if node.parts else min(length, -(-num_pages // len(runs)))
        while node.parts and taken < length and count < num_pages:
            taken += 1
            count += sum(run[-taken] != NULL_PAGE for run in runs)
        left = length - taken
        freed = [page for run in runs for page in run[left:] if page]
        if self.on_evicted is not None:
            self.on_evicted(node, node.tokens[left * self._page_bytes : length * self._page_bytes])
        for run in runs:
            del run[left:]
        self.num_evictable -= len(freed)
        self._lose_snapshot(node)
        for part in node.parts:
            was_in_order = part.hole < part.free_to
            part.hole, part.free_to = min(part.hole, left), left
            if was_in_order and part.hole == left:
                unlink(part)
        if not left or self._is_bare(node):
            self._remove(node)
        # Cutting the tokens each time would copy a long run for every page of it; this is amortised.
        elif 2 * left * self._page_bytes <= len(node.tokens):
            node.tokens = node.tokens[: left * self._page_bytes]
        return freed

    def _remove(self, node: Node) -> None:
        """Take an unlocked leaf without pages out, and what it leaves behind without pages and children."""
        while True:
            parent = node.parent
            assert parent is not None
            del parent.children[node.key]
            node.detached = True
            self._lose_snapshot(node)
            self.policy.remove(node)
            if parent.parent is None:
                self._drop_bare_root(parent)
                return
            if parent.children or parent.lock_count or not self._is_bare(parent):
                return
            node = parent

    def _is_bare(self, node: Node) -> bool:
        """It has no page of any group: only where all layers have windows."""
        return not self._num_full and all(part.hole == node.length for part in node.parts)

    # ---- failure

    def detach(self, node: Node, depth: int, first_page: int) -> list[int]:
        """Cut off what stands on the path of `node` (which ends at `depth`) from page first_page on.

        The caller holds the lock at `node`. Returns the pages to free now; those of nodes that are locked follow
        from the last `unlock`. A lock at a detached node still covers its whole path.
        """
        top = None
        while node.parent is not None and depth > first_page:
            start = depth - node.length
            if start < first_page and not node.detached:
                self._split(node, first_page - start)
            top, node, depth = node, node.parent, depth - node.length
        freed: list[int] = []
        if top is None or top.detached:  # the former: nothing was entered; the latter: another one took it back
            return freed
        assert top.parent is not None
        del top.parent.children[top.key]
        stack = [top]
        while stack:
            node = stack.pop()
            stack += node.children.values()
            node.children = {}
            node.detached = True
            self._lose_snapshot(node)
            before = len(freed)
            for part in node.parts:
                if part.hole < part.free_to:
                    unlink(part)
                    freed += self._punch(part, part.free_to - part.hole)
            if not node.lock_count:
                self.policy.remove(node)
                freed += self._full_pages(node)
            self.num_evictable -= len(freed) - before
        return freed

    # ---- for checks

    def roots(self) -> list[Node]:
        return list(self._roots.values())

    def nodes(self) -> Iterator[Node]:
        """All nodes but the roots, parents first."""
        stack = self.roots()
        while stack:
            for child in stack.pop().children.values():
                stack.append(child)
                yield child

    def parts_in_order(self, window: int) -> list[Part]:
        """As they would go."""
        return list(self._orders[window])

    def snapshots(self) -> list[Snapshot]:
        """As they would go, those last that do not."""
        return [*self._snapshots, *self._pinned]

    # ---- walking

    def _walk(self, node: Node, data: bytes, depth: int, limit: int) -> tuple[list[Node], int]:
        """The nodes below `node` along `data`, and how many pages of the last one's run agree with it."""
        path: list[Node] = []
        page_bytes, length = self._page_bytes, 0
        offset, end = depth * page_bytes, limit * page_bytes
        while offset < end and (child := node.children.get(data[offset : offset + page_bytes])) is not None:
            node = child
            path.append(node)
            tokens, length = node.tokens, len(node.runs[0])
            size = length * page_bytes
            if offset + size <= end and data.startswith(tokens, offset):
                offset += size  # one memcmp, no copy
                continue
            size = min(size, end - offset)
            count = size // TOKEN_BYTES
            differs = np.frombuffer(data, np.int32, count, offset) != np.frombuffer(tokens, np.int32, count)
            first = int(differs.argmax())
            agreed = first // self._page_size if differs[first] else size // page_bytes
            if agreed < length:
                return path, agreed
            offset += size
        return path, length

    def _usable(self, root: Node, data: bytes, limit: int) -> tuple[list[Node], int, int]:
        """`_walk` from the root, cut back to where every window has what it sees, and the state is; and its own length.

        In one node that is its last page that agrees, or none: the further on, the less of a hole is seen.
        """
        path, length = self._walk(root, data, 0, limit)
        if not self.members and not self._has_state:
            return path, length, 0
        # By window: where the pages begin that are there without a gap up to here.
        firsts = [0] * len(self.members)
        best, best_size, depth = 0, 0, 0
        for number, node in enumerate(path, 1):
            size = length if number == len(path) else node.length
            for part in node.parts:
                if part.hole:
                    firsts[part.window] = depth + min(part.hole, size)
            depth += size
            end = depth * self._page_size
            if self._has_state and (node.snapshot is None or size < node.length):
                continue
            if all(
                self.groups[members[0]].behind(end, self._page_size) >= first
                for members, first in zip(self.members, firsts, strict=True)
            ):
                best, best_size = number, size
        return path[:best], best_size, depth

    def _path(self, node: Node, depth: int, first: int) -> list[tuple[Node, int]]:
        """The nodes on the way to `node` that have pages from `first` on, and where each begins; the upper first."""
        path: list[tuple[Node, int]] = []
        while depth > first and node.parent is not None:
            depth -= node.length
            path.append((node, depth))
            node = node.parent
        path.reverse()
        return path

    def _split(self, node: Node, length: int) -> Node:
        """Cut a run after `length` pages; `node` stays the deeper part, where locks and children are.

        The new upper part enters no order of the policy's: its caller has locked it or is about to.
        """
        parent, cut = node.parent, length * self._page_bytes
        assert parent is not None and 0 < length < node.length
        upper = Node(parent, node.key, node.tokens[:cut], [run[:length] for run in node.runs])
        upper.lock_count, upper.hits, upper.entered, upper.used = node.lock_count, node.hits, node.entered, node.used
        upper.parts = [self._split_part(part, upper, length) for part in node.parts]
        parent.children[node.key] = upper
        node.parent = upper
        node.tokens = node.tokens[cut : node.length * self._page_bytes]
        node.key = node.tokens[: self._page_bytes]
        node.runs = [run[length:] for run in node.runs]
        upper.children[node.key] = node
        return upper

    @staticmethod
    def _split_part(part: Part, upper: Node, length: int) -> Part:
        """A lock reaches to the end of its node, so the deeper part has them all."""
        above = Part(upper, part.window, min(part.hole, length), min(part.free_to, length))
        above.used = part.used
        was_in_order = part.hole < part.free_to
        locks, part.locks = part.locks, {}
        for first, count in locks.items():
            if first < length:
                above.locks[first] = count
            below = max(0, first - length)
            part.locks[below] = part.locks.get(below, 0) + count
        part.hole, part.free_to = max(0, part.hole - length), max(0, part.free_to - length)
        if above.hole < above.free_to:
            insert_before(above, part)
        if was_in_order and part.hole == part.free_to:
            unlink(part)
        return above

    def _drop_bare_root(self, root: Node) -> None:
        if not root.lock_count and not root.children:
            del self._roots[root.key]

    # ---- locks

    def _lock(self, path: list[Node], depth: int, gone: Sequence[int], cut: Node | None) -> None:
        """Lock nodes that follow each other from `depth` on. cut: the one just split off, which is in no order."""
        for node in path:
            if not node.lock_count:
                if node is not cut:
                    self.policy.remove(node)
                self.num_evictable -= self._num_full * node.length
            node.lock_count += 1
            node.hits += 1
            if node.parts:
                for part, members in zip(node.parts, self.members, strict=True):
                    first = max(0, gone[members[0]] - depth)
                    if first < node.length:
                        self._hold(part, first)
                depth += node.length

    def _hold(self, part: Part, first: int) -> None:
        """One more lock that needs the part's pages from `first` on."""
        part.locks[first] = part.locks.get(first, 0) + 1
        if first < part.free_to:
            was_in_order = part.hole < part.free_to
            self.num_evictable -= (part.free_to - max(first, part.hole)) * len(self.members[part.window])
            # Below a hole only where the caller fills it next.
            part.free_to = first
            if was_in_order and first <= part.hole:
                unlink(part)

    def _drop(self, part: Part, first: int) -> list[int]:
        """A lock that needed the part's pages from `first` on has gone. Returns pages to free, if it is detached."""
        count = part.locks[first] - 1
        if count:
            part.locks[first] = count
            return []
        del part.locks[first]
        if first > part.free_to:
            return []
        before, part.free_to = part.free_to, min(part.locks, default=part.node.length)
        if part.node.detached:
            return self._punch(part, part.free_to - part.hole)
        self.num_evictable += (part.free_to - before) * len(self.members[part.window])
        if part.hole < before:
            unlink(part)
        part.used = self._ticks
        self._orders[part.window].add(part)
        return []

    def _fill(self, part: Part, start: int, own: Runs, depth: int, gone: Sequence[int]) -> None:
        """Put pages of one's own, which begin at `depth`, into the hole of a node that begins at `start`."""
        members, runs = self.members[part.window], part.node.runs
        first = max(0, gone[members[0]] - start)
        for group in members if first < part.hole else ():
            runs[group][first : part.hole] = own[group][start + first - depth : start + part.hole - depth]
        part.hole = min(part.hole, first)

    def _punch(self, part: Part, count: int) -> list[int]:
        """Make the hole `count` pages longer; returns the pages."""
        freed: list[int] = []
        for group in self.members[part.window]:
            run = part.node.runs[group]
            freed += run[part.hole : part.hole + count]
            run[part.hole : part.hole + count] = [NULL_PAGE] * count
        part.hole += count
        return freed

    def _full_pages(self, node: Node) -> list[int]:
        """Of the groups without a window."""
        return [page for run, group in zip(node.runs, self.groups, strict=True) if group.window is None for page in run]

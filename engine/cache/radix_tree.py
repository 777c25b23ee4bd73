"""RadixTree: which pages hold the KV of which token prefix. Owned and called by KVCache alone.

An edge holds a run of whole pages and its tokens as one bytes object, so a match costs one dict look-up and one
memcmp per node, not per page. Reading starts at a locked place: `open` locks a namespace's root, `match` and
`insert` move that lock deeper, `unlock` gives the whole path back. Nodes without locks are in the eviction
policy's order. The tree never frees: it returns page ids, and its owner gives them to the pool.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from engine.cache.eviction.base import EvictionPolicy

TOKEN_BYTES = 4  # a token is an int32 in the bytes that the tree takes


class Node:
    """One edge and the place below it. `tokens` may be longer than the run: a tail is trimmed lazily."""

    __slots__ = (
        "children",  # first page's bytes -> Node
        "detached",  # no longer in the tree
        "entered",  # tick at which its pages were entered
        "hits",  # locks so far
        "key",  # bytes of the first page; of a root, its namespace
        "lock_count",  # locks held at this node or below it
        "next",  # these three are the eviction policy's
        "pages",
        "parent",  # None: a root
        "previous",
        "queued",
        "tokens",
    )
    previous: Node
    next: Node

    def __init__(self, parent: Node | None, key: bytes, tokens: bytes, pages: list[int]) -> None:
        self.parent = parent
        self.key = key
        self.tokens = tokens
        self.pages = pages
        self.children: dict[bytes, Node] = {}
        self.lock_count = 0
        self.hits = 0
        self.entered = 0
        self.queued = False
        self.detached = False


class RadixTree:
    """`data` is always the int32 bytes of a prompt from its first token; `depth` counts pages from there."""

    def __init__(self, page_size: int, policy: EvictionPolicy) -> None:
        self.num_evictable = 0  # pages of unlocked nodes
        self.policy = policy
        self._page_size = page_size
        self._page_bytes = page_size * TOKEN_BYTES
        self._roots: dict[bytes, Node] = {}
        self._ticks = 0

    def open(self, namespace: str) -> Node:
        """Lock the root of a namespace, which lives while it is locked or has children."""
        key = namespace.encode(errors="surrogatepass")
        root = self._roots.get(key)
        if root is None:
            root = self._roots[key] = Node(None, key, b"", [])
        root.lock_count += 1
        return root

    def match(self, node: Node, data: bytes, depth: int, limit: int) -> tuple[Node, list[int]]:
        """Move a lock from `node`, which ends at `depth`, to where `data` is known, `limit` pages at most.

        Returns the node that ends there, split off if that is amid a run, and the pages on the way.
        """
        assert not node.detached, "match below a node that was detached"
        path, length = self._walk(node, data, depth, limit)
        cut = None
        if path and length < len(path[-1].pages):
            cut = path[-1] = self._split(path[-1], length)
        pages: list[int] = []
        for child in path:
            if not child.lock_count:
                if child is not cut:  # which is new, and in no order yet
                    self.policy.remove(child)
                self.num_evictable -= len(child.pages)
            child.lock_count += 1
            child.hits += 1
            pages += child.pages
        return (path[-1] if path else node), pages

    def match_length(self, namespace: str, data: bytes, limit: int) -> int:
        """Pages that `match` would find from the root; changes nothing."""
        root = self._roots.get(namespace.encode(errors="surrogatepass"))
        if root is None:
            return 0
        path, length = self._walk(root, data, 0, limit)
        return sum([len(node.pages) for node in path[:-1]], length)

    def insert(self, node: Node, data: bytes, depth: int, pages: list[int]) -> tuple[Node, list[int]]:
        """Move a lock from `node` to the end of `pages`, which hold data's pages from `depth` on.

        Returns that end and the canonical pages: what the tree had already, in place of as many of the first
        `pages`, which are now duplicates for the caller to free. The rest of `pages` belong to the tree.
        """
        end = depth + len(pages)
        node, canonical = self.match(node, data, depth, end)
        start = depth + len(canonical)
        if start < end:
            tokens = data[start * self._page_bytes : end * self._page_bytes]
            leaf = Node(node, tokens[: self._page_bytes], tokens, pages[len(canonical) :])
            leaf.lock_count = leaf.hits = 1
            self._ticks += 1
            leaf.entered = self._ticks
            node.children[leaf.key] = leaf
            node = leaf
        return node, canonical

    def unlock(self, node: Node) -> list[int]:
        """Give back the lock at `node` and so on the path to it. Returns the pages of detached nodes to free."""
        freed: list[int] = []
        while node.parent is not None:
            assert node.lock_count > 0, "unlock of a node that is not locked"
            node.lock_count -= 1
            if not node.lock_count:
                if node.detached:
                    freed += node.pages
                else:
                    self.num_evictable += len(node.pages)
                    self.policy.add(node)
            node = node.parent
        assert node.lock_count > 0, "unlock of a root that is not locked"
        node.lock_count -= 1
        self._drop_bare_root(node)
        return freed

    def evict(self, num_pages: int) -> list[int]:
        """Take up to num_pages unlocked pages out, in the policy's order; a leaf gives its tail first."""
        freed: list[int] = []
        while (missing := num_pages - len(freed)) > 0 and (node := self.policy.victim()) is not None:
            pages = node.pages
            if len(pages) > missing:
                freed += pages[-missing:]
                del pages[-missing:]
                # Cutting the tokens each time would copy a long run for every page of it; this is amortised.
                if 2 * len(pages) * self._page_bytes <= len(node.tokens):
                    node.tokens = node.tokens[: len(pages) * self._page_bytes]
                break
            freed += pages
            parent = node.parent
            assert parent is not None and not node.children and not node.lock_count, "the victim is in use"
            del parent.children[node.key]
            node.detached = True
            self.policy.remove(node)
            if not parent.children and parent.parent is None:
                self._drop_bare_root(parent)
        self.num_evictable -= len(freed)
        return freed

    def detach(self, node: Node, depth: int, first_page: int) -> list[int]:
        """Cut off what stands on the path of `node` (which ends at `depth`) from page first_page on.

        The caller holds the lock at `node`. Returns the pages to free now; those of nodes that are locked follow
        from the last `unlock`. A lock at a detached node still covers its whole path.
        """
        top = None
        while node.parent is not None and depth > first_page:
            start = depth - len(node.pages)
            if start < first_page and not node.detached:
                self._split(node, first_page - start)
            top, node, depth = node, node.parent, depth - len(node.pages)
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
            if not node.lock_count:
                self.num_evictable -= len(node.pages)
                self.policy.remove(node)
                freed += node.pages
        return freed

    def roots(self) -> list[Node]:
        return list(self._roots.values())

    def nodes(self) -> Iterator[Node]:
        """All nodes but the roots, parents first, for checks."""
        stack = self.roots()
        while stack:
            for child in stack.pop().children.values():
                stack.append(child)
                yield child

    def _walk(self, node: Node, data: bytes, depth: int, limit: int) -> tuple[list[Node], int]:
        """The nodes below `node` along `data`, and how many pages of the last one's run agree with it."""
        path: list[Node] = []
        page_bytes, length = self._page_bytes, 0
        offset, end = depth * page_bytes, limit * page_bytes
        while offset < end and (child := node.children.get(data[offset : offset + page_bytes])) is not None:
            node = child
            path.append(node)
            tokens, length = node.tokens, len(node.pages)
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

    def _split(self, node: Node, length: int) -> Node:
        """Cut a run after `length` pages; `node` stays the deeper part, where locks and children are.

        The new upper part enters no eviction order: its caller has locked it or is about to.
        """
        parent, cut = node.parent, length * self._page_bytes
        assert parent is not None and 0 < length < len(node.pages)
        upper = Node(parent, node.key, node.tokens[:cut], node.pages[:length])
        upper.lock_count, upper.hits, upper.entered = node.lock_count, node.hits, node.entered
        parent.children[node.key] = upper
        node.parent = upper
        node.tokens = node.tokens[cut : len(node.pages) * self._page_bytes]
        node.key = node.tokens[: self._page_bytes]
        node.pages = node.pages[length:]
        upper.children[node.key] = node
        return upper

    def _drop_bare_root(self, root: Node) -> None:
        if not root.lock_count and not root.children:
            del self._roots[root.key]

"""First in, first out: the leaf that was entered first goes first, and use does not count.

A heap of leaves by the tick at which they were entered. The key of a node never changes, so a locked node may
stay in the heap until it comes to the top, and a node is never in it twice. O(log n) per evicted node with n
leaves in the heap, O(1) while a leaf only gives up its tail.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from engine.cache.node import Node


def _may_go(node: Node) -> bool:
    return not (node.lock_count or node.children or node.detached or node.parent is None)


class FIFO:
    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Node]] = []  # (entered, tie-break, node)
        self._ties = 0  # the two halves of a split node were entered together

    def add(self, node: Node) -> None:
        if not node.queued and _may_go(node):
            node.queued = True
            self._ties += 1
            heapq.heappush(self._heap, (node.entered, self._ties, node))

    def remove(self, node: Node) -> None:
        if node.detached and node.parent is not None:
            self.add(node.parent)  # which may have become a leaf

    def victim(self) -> Node | None:
        while self._heap:
            node = self._heap[0][2]
            if _may_go(node):
                return node
            heapq.heappop(self._heap)
            node.queued = False
        return None

    def order(self) -> Iterator[Node]:
        heap = [entry for entry in self._heap if _may_go(entry[2])]
        heapq.heapify(heap)
        gone: dict[int, int] = {}  # id of a parent -> its children that went
        while heap:
            _, tie, node = heapq.heappop(heap)
            yield node
            parent = node.parent
            assert parent is not None
            gone[id(parent)] = gone.get(id(parent), 0) + 1
            if parent.parent is not None and not parent.lock_count and gone[id(parent)] == len(parent.children):
                heapq.heappush(heap, (parent.entered, tie, parent))

"""Least recently used: one intrusive doubly linked list of unlocked nodes. O(1) per eviction.

A path is added deepest first, so a parent is always younger than its children: the old end is a leaf.
"""

from __future__ import annotations

from collections.abc import Iterator

from engine.cache.radix_tree import Node


def unlink(node: Node) -> None:
    node.previous.next = node.next
    node.next.previous = node.previous
    del node.previous, node.next  # so a second removal is an error, and a node that went holds on to no other


class LRU:
    def __init__(self) -> None:
        # The sentinel closes the ring: after it the old end, before it the young end.
        self._sentinel = Node(None, b"", b"", [])
        self._sentinel.previous = self._sentinel.next = self._sentinel

    def add(self, node: Node) -> None:
        young, sentinel = self._sentinel.previous, self._sentinel
        node.previous, node.next = young, sentinel
        young.next = sentinel.previous = node

    remove = staticmethod(unlink)

    def victim(self) -> Node | None:
        node = self._sentinel.next
        return node if node is not self._sentinel else None

    def order(self) -> Iterator[Node]:
        node = self._sentinel.next
        while node is not self._sentinel:
            yield node
            node = node.next

"""Least recently used: one ring of unlocked nodes. O(1) per eviction.

A path is added deepest first, so a parent is always younger than its children: the old end is a leaf.
"""

from __future__ import annotations

from collections.abc import Iterator

from engine.cache.eviction.ring import Ring, unlink
from engine.cache.node import Node


class LRU(Ring[Node]):
    remove = staticmethod(unlink)

    def victim(self) -> Node | None:
        return self.oldest()

    def order(self) -> Iterator[Node]:
        return iter(self)

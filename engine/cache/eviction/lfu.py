"""Least frequently used, least recently among equals: one LRU list per number of hits, MAX_HITS and more in one.

A lock hits every node of its path, so a parent has at least the hits of its children, and in one list it is
the younger: the old end of the lowest list is a leaf. O(1) per eviction: no search, but at most MAX_HITS steps
past empty lists.
"""

from __future__ import annotations

from collections.abc import Iterator

from engine.cache.eviction.lru import LRU
from engine.cache.eviction.ring import unlink
from engine.cache.node import Node

MAX_HITS = 255  # a hot prompt has millions; the bound keeps the number of lists and of empty ones small


class LFU:
    def __init__(self) -> None:
        self._lists = [LRU()]  # as many as there have been hits
        self._lowest = 0  # no list below it holds a node

    def add(self, node: Node) -> None:
        hits = min(node.hits, MAX_HITS)
        while len(self._lists) <= hits:
            self._lists.append(LRU())
        self._lowest = min(self._lowest, hits)
        self._lists[hits].add(node)

    remove = staticmethod(unlink)

    def victim(self) -> Node | None:
        while (node := self._lists[self._lowest].victim()) is None and self._lowest < len(self._lists) - 1:
            self._lowest += 1
        return node

    def order(self) -> Iterator[Node]:
        for nodes in self._lists:
            yield from nodes.order()

"""What an eviction policy is: an order over the unlocked nodes of a RadixTree, which alone calls it.

The tree keeps two promises: a node is unlocked only if all nodes below it are, and `add` is called for the
nodes of a path deepest first. A policy keeps one: `victim` has no children. Policies read `children`,
`lock_count`, `hits`, `entered` and `detached` of a node; `previous`, `next` and `queued` are theirs to write.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from engine.cache.node import Node


class EvictionPolicy(Protocol):
    def add(self, node: Node) -> None:
        """The last lock on `node` has gone."""

    def remove(self, node: Node) -> None:
        """`node`, which was unlocked, is locked now or has just left the tree."""

    def victim(self) -> Node | None:
        """The unlocked leaf to go next, None when there is none. It stays until `remove`."""

    def order(self) -> Iterator[Node]:
        """All unlocked nodes as they would go, for checks."""

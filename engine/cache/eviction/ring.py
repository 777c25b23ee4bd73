"""Ring: an intrusive doubly linked list, oldest first. Everything is O(1); a link is in one ring at most."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar, cast


class Link:
    __slots__ = ("next", "previous")
    previous: Link
    next: Link


L = TypeVar("L", bound=Link)


class Ring(Generic[L]):
    """Of links of one type. A sentinel closes it: after it the old end, before it the young end."""

    def __init__(self) -> None:
        self._sentinel = Link()
        self._sentinel.previous = self._sentinel.next = self._sentinel

    def add(self, link: L) -> None:
        """As the youngest."""
        insert_before(link, self._sentinel)

    def oldest(self) -> L | None:
        link = self._sentinel.next
        return cast(L, link) if link is not self._sentinel else None

    def __iter__(self) -> Iterator[L]:
        link = self._sentinel.next
        while link is not self._sentinel:
            yield cast(L, link)
            link = link.next


def insert_before(link: Link, younger: Link) -> None:
    """Put `link` into the ring of `younger`, right on its old side."""
    older = younger.previous
    link.previous, link.next = older, younger
    older.next = younger.previous = link


def unlink(link: Link) -> None:
    link.previous.next = link.next
    link.next.previous = link.previous
    del link.previous, link.next  # so a second removal is an error, and a node that went holds on to no other

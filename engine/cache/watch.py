"""CacheWatch: whoever wants to know which prefixes are cached (a router's index of KV events, say)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class CacheWatch(Protocol):
    """Called on the loop thread, in order; must neither block nor raise."""

    def stored(self, namespace: str, data: bytes, first: int, pages: Sequence[int], before: int) -> None:
        """From now on others may find these pages, which hold the KV of data's pages from `first` on; some of them may
        have been told of before, and null pages stand for what the sequence no longer sees.

        data: int32 bytes of the tokens from the first on. pages: ids in the first group that has no window (or in the
        first). before: the page before them there.
        """
        ...

    def freed(self, pages: Sequence[int]) -> None:
        """Pages of any kind whose content is gone; most of them nobody has been told of."""
        ...

    def cleared(self) -> None:
        """Nothing is cached any more."""
        ...

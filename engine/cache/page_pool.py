"""PagePool: the free list of page ids (and of snapshots'). Owned and called by KVCache alone, on the loop thread.

Ids are 1..num_pages; page 0 is the null page and is never handed out. Every page is asserted twice, when it
is freed and when it is handed out, because a page with two owners shows up as somebody else's wrong text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from engine.forward import NULL_PAGE


class PagePool:
    """A stack of free ids and one byte of state per page; O(1) per page, whatever the size of the pool."""

    def __init__(self, num_pages: int) -> None:
        assert num_pages > 0, f"a pool needs at least one page, not {num_pages}"
        self.num_pages = num_pages
        self.on_freed: Callable[[Sequence[int]], None] | None = None
        self._free = list(range(num_pages, NULL_PAGE, -1))  # low ids are handed out first
        self._is_free = bytearray([1]) * (num_pages + 1)  # the null page too: freeing it is a double free

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, n: int) -> list[int]:
        """Hand out n pages; asking for more than num_free is the caller's bug."""
        assert 0 <= n <= len(self._free), f"{n} pages asked for, {len(self._free)} are free"
        split = len(self._free) - n
        pages = self._free[split:]
        del self._free[split:]
        pages.reverse()
        is_free = self._is_free
        for page in pages:
            assert is_free[page], f"page {page} is on the free list and in use"
            is_free[page] = 0
        return pages

    def allocate_one(self) -> int:
        """`allocate(1)` without the list: decode asks for single pages."""
        page = self._free.pop()
        assert self._is_free[page], f"page {page} is on the free list and in use"
        self._is_free[page] = 0
        return page

    def free(self, pages: Sequence[int]) -> None:
        is_free = self._is_free
        for page in pages:  # an id of another pool is an IndexError
            assert not is_free[page], f"page {page} is freed twice"
            is_free[page] = 1
        self._free.extend(pages)
        if self.on_freed is not None:
            self.on_freed(pages)

    def is_free(self, page: int) -> bool:
        return bool(self._is_free[page])

    def all_free(self) -> npt.NDArray[np.bool_]:
        """bool [num_pages], of the pages from 1 on; a copy."""
        return np.frombuffer(self._is_free, np.bool_)[1:].copy()

    def free_pages(self) -> list[int]:
        """A copy of the free list, for checks."""
        return self._free.copy()

"""Counts work instead of measuring time: how many functions were called, the same number on any machine.

What takes time without calling anything, in a library of another language say, does not show: that has bounds of its
own.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any


class Work:
    """num_calls: of functions of Python and of C, by this thread, until now."""

    def __init__(self) -> None:
        self.num_calls = 0

    def count(self, frame: Any, event: str, argument: Any) -> None:
        if event in ("call", "c_call"):
            self.num_calls += 1


@contextlib.contextmanager
def counted() -> Iterator[Work]:
    """The work that is done inside."""
    work, before = Work(), sys.getprofile()
    sys.setprofile(work.count)
    try:
        yield work
    finally:
        sys.setprofile(before)

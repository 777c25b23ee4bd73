"""The error for a keyword that cannot be written in what the grammar library knows."""

from __future__ import annotations

from typing import Any


class Unwritable(Exception):
    """A keyword that cannot be written in what the library knows; `keyword`, `where` and a reason for the sentence."""

    def __init__(self, keyword: str, where: str, why: str) -> None:
        super().__init__(f"{keyword} at {where}: {why}")
        self.keyword, self.where, self.why = keyword, where, why


def cannot(keyword: str, where: str, why: str) -> Any:
    raise Unwritable(keyword, where, why)

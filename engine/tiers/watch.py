"""TierWatch: whoever wants to know which prefixes are kept beside the cache (a router's index of KV events, say)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

# As vLLM's events call host memory and what is below it.
HOST, DISK = "CPU", "STORAGE"


class TierWatch(Protocol):
    """Must neither block nor raise. Names are those of a store; of groups, those in which pages of the cache are told
    of (see CacheWatch), and others that nobody has named."""

    def named(self, namespace: str, data: bytes, names: Sequence[bytes]) -> None:
        """What a prompt's pages are called from its first on. data: int32 bytes of its tokens. Loop thread; before
        anything is told of them."""
        ...

    def came(self, medium: str, name: bytes) -> None:
        """It is there: it has come, or was found. Any thread."""
        ...

    def went(self, medium: str, name: bytes) -> None:
        """It is there no more. Any thread."""
        ...

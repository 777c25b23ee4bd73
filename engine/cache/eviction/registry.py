"""The eviction policies by the name that `--radix-eviction-policy` takes; a new one is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable

from engine.cache.eviction.base import EvictionPolicy
from engine.cache.eviction.fifo import FIFO
from engine.cache.eviction.lfu import LFU
from engine.cache.eviction.lru import LRU
from engine.config import StartupError

EVICTION_POLICIES: dict[str, Callable[[], EvictionPolicy]] = {"lru": LRU, "lfu": LFU, "fifo": FIFO}


def make_eviction_policy(name: str) -> EvictionPolicy:
    """Raises StartupError for a name that is not known."""
    if name not in EVICTION_POLICIES:
        raise StartupError(f"unknown eviction policy '{name}'; known are: {', '.join(sorted(EVICTION_POLICIES))}")
    return EVICTION_POLICIES[name]()

"""The eviction policies by the name that `--eviction-policy` takes: a new policy is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable

from engine.cache.eviction.base import EvictionPolicy
from engine.cache.eviction.fifo import FIFO
from engine.cache.eviction.lfu import LFU
from engine.cache.eviction.lru import LRU

EVICTION_POLICIES: dict[str, Callable[[], EvictionPolicy]] = {"lru": LRU, "lfu": LFU, "fifo": FIFO}

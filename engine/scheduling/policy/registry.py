"""Admission policies by name; a new one is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable

from engine.cache.kv_cache import KVCache
from engine.config import StartupError
from engine.scheduling.policy.base import AdmissionPolicy
from engine.scheduling.policy.fair import Fair
from engine.scheduling.policy.fcfs import FCFS
from engine.scheduling.policy.lpm import LPM
from engine.scheduling.policy.priority import Priority

POLICIES: dict[str, Callable[[KVCache], AdmissionPolicy]] = {
    "fair": Fair,
    "fcfs": FCFS,
    "lpm": LPM,
    "priority": Priority,
}


def make_policy(name: str, cache: KVCache) -> AdmissionPolicy:
    """cache: to be asked, not to be changed."""
    if name not in POLICIES:
        raise StartupError(f"unknown schedule policy '{name}'; known are: {', '.join(sorted(POLICIES))}")
    return POLICIES[name](cache)

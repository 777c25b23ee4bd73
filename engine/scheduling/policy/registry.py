"""Admission policies by name; a new one is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable

from engine.config import StartupError
from engine.scheduling.policy.base import AdmissionPolicy
from engine.scheduling.policy.fcfs import FCFS

POLICIES: dict[str, Callable[[], AdmissionPolicy]] = {"fcfs": FCFS}


def make_policy(name: str) -> AdmissionPolicy:
    if name not in POLICIES:
        raise StartupError(f"unknown schedule policy '{name}'; known are: {', '.join(sorted(POLICIES))}")
    return POLICIES[name]()

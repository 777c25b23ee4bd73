"""What a start tells the person who waits for it: time by phase, and a table of what was decided."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class StartupReport:
    """phases: seconds by name, in order. rows: (name, what was decided)."""

    def __init__(self, started_at: float | None = None) -> None:
        self.started_at = time.perf_counter() if started_at is None else started_at
        self.phases: dict[str, float] = {}
        self.rows: list[tuple[str, str]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a part of the start."""
        begin = time.perf_counter()
        yield
        self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - begin

    def row(self, name: str, text: str) -> None:
        self.rows.append((name, text))

    @property
    def total_seconds(self) -> float:
        return time.perf_counter() - self.started_at

    def finish(self) -> float:
        """The start is over. Returns its seconds, which those of the phases add up to: "other" is in none of them."""
        total = self.total_seconds
        self.phases["other"] = 0.0
        self.phases["other"] = total - sum(self.phases.values())
        return total

    def table(self) -> str:
        """The rows and the phases as aligned text. Finishes."""
        total = self.finish()
        phases = ", ".join(f"{name} {seconds:.2f}" for name, seconds in self.phases.items() if seconds >= 0.005)
        rows = [*self.rows, ("start-up", f"{total:.2f} s ({phases})")]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"  {name:<{width}}  {text}" for name, text in rows)

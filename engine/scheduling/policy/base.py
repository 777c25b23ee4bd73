"""The order of admission: a protocol and its registry. One file per policy beside this one."""

from __future__ import annotations

from typing import Protocol

from engine.scheduling.sequence import Sequence


class AdmissionPolicy(Protocol):
    """Sequences that wait for a slot. An aborted one stays inside and is passed over: abort is O(1)."""

    def push(self, sequence: Sequence) -> None:
        """A new sequence."""
        ...

    def push_front(self, sequence: Sequence) -> None:
        """A retracted sequence: it was admitted before, so it goes before all that were not."""
        ...

    def peek(self) -> Sequence | None:
        """The next to admit, or None."""
        ...

    def pop(self) -> Sequence:
        """Remove what `peek` returned."""
        ...

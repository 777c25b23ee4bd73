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

    def peek(self, turn: int) -> Sequence | None:
        """The next to admit, or None. Nothing but admissions happens between two calls with the same `turn`."""
        ...

    def pop(self) -> Sequence:
        """Remove what `peek` has just returned: it is admitted. Its num_cached_tokens is known."""
        ...

    def set_aside(self) -> None:
        """Remove what `peek` has just returned: it must wait for something, and is not admitted."""
        ...

    def put_back(self, sequence: Sequence) -> None:
        """One that was set aside takes its place again. May come between two calls with the same `turn`."""
        ...

    def victim(self, running: list[Sequence]) -> Sequence:
        """Whom to retract when pages run out; running: at least two, in order of admission.

        Whatever the policy, one sequence must be the last choice until it ends: it is what always advances.
        """
        return running[-1]

    def finished(self, sequence: Sequence) -> None:
        """A sequence has ended, in whatever state it was; called once."""
        return None

"""What drafts tokens: the protocol of a proposer.

A proposer guesses how a sequence goes on; the executor checks its guesses, so that they change how fast tokens come
and never which. It lives on the executor's thread and is told of every slot that speculates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.forward import Int32Array


@dataclass(slots=True, eq=False)
class Text:
    """A sequence as its slot's executor knows it: all tokens, the last of them not computed yet.

    Proposers read it; the executor changes it, and says so by `Proposer.advance`.
    """

    tokens: list[int]
    namespace: str
    prediction: Int32Array | None = None


class Proposer(Protocol):
    """Drafts for slots. Nothing it raises is survived by the step, so it raises nothing for any text."""

    def start(self, slot: int, text: Text) -> None:
        """The slot speculates from now on."""
        ...

    def stop(self, slot: int) -> None:
        """It does no more; its text is not looked at again."""
        ...

    def advance(self, slot: int, kept: int) -> None:
        """Its text has changed: the first `kept` tokens are as they were."""
        ...

    def propose(self, slots: Sequence[int], most: Sequence[int]) -> list[list[int]]:
        """For each slot at most so many tokens that may follow its text; [] for no idea."""
        ...


class OneByOne:
    """A proposer whose slots know nothing of each other: `draft` is all it needs beside what is kept of a slot."""

    def propose(self, slots: Sequence[int], most: Sequence[int]) -> list[list[int]]:
        """See Proposer."""
        return [self.draft(slot, count) if count > 0 else [] for slot, count in zip(slots, most, strict=True)]

    def draft(self, slot: int, most: int) -> list[int]:
        """At most so many tokens that may follow."""
        raise NotImplementedError


class FirstOf:
    """Proposers in order of preference: a slot's drafts are those of the first that has any."""

    def __init__(self, proposers: Sequence[Proposer]) -> None:
        self._proposers = proposers

    def start(self, slot: int, text: Text) -> None:
        """See Proposer."""
        for proposer in self._proposers:
            proposer.start(slot, text)

    def stop(self, slot: int) -> None:
        """See Proposer."""
        for proposer in self._proposers:
            proposer.stop(slot)

    def advance(self, slot: int, kept: int) -> None:
        """See Proposer."""
        for proposer in self._proposers:
            proposer.advance(slot, kept)

    def propose(self, slots: Sequence[int], most: Sequence[int]) -> list[list[int]]:
        """See Proposer."""
        found: list[list[int]] = [[] for _ in slots]
        open_ = list(range(len(slots)))
        for proposer in self._proposers:
            drafts = proposer.propose([slots[index] for index in open_], [most[index] for index in open_])
            for index, draft in zip(open_, drafts, strict=True):
                found[index] = draft
            open_ = [index for index in open_ if not found[index]]
            if not open_:
                break
        return found

"""Proposer "ngram": what followed when the same last tokens stood before, in this sequence or in another's answer.

The longest match wins, then the sequence's own, then the latest. A match has at least `prompt_lookup_min` tokens;
beyond `prompt_lookup_max` more of them only break ties.
"""

from __future__ import annotations

from engine.config import SpeculationOptions
from engine.speculation.base import OneByOne, Text
from engine.speculation.matching import Indexed, Match, Store, continuation

_TIE_BREAK = 32


class NGram(OneByOne):
    """See the module."""

    def __init__(self, least: int, most: int) -> None:
        self._least = least
        self._limit = max(most, _TIE_BREAK)
        self._store = Store(least)
        self._texts: dict[int, Indexed] = {}

    def start(self, slot: int, text: Text) -> None:
        """See Proposer."""
        self._texts[slot] = Indexed(text, self._least, self._store)

    def stop(self, slot: int) -> None:
        """See Proposer."""
        self._texts.pop(slot, None)

    def advance(self, slot: int, kept: int) -> None:
        """See Proposer."""
        self._texts[slot].advance(kept)

    def draft(self, slot: int, most: int) -> list[int]:
        """See OneByOne."""
        text = self._texts[slot]
        best: Match | None = None
        for match in text.matches(self._limit):
            if best is None or match.length > best.length:
                best = match
                if best.length >= self._limit:
                    break
        return [] if best is None else continuation(best, text.text.tokens, most)


def make(options: SpeculationOptions) -> NGram:
    """The proposer as it was asked for."""
    return NGram(options.prompt_lookup_min, options.prompt_lookup_max)

"""Proposer "suffix": the longest suffix that was seen before, and what followed it, for as long as that is sure.

After SuffixDecoding (Oliaro et al. 2024): drafts are at most `suffix_max_spec_factor` times as long as the match, and
end where the share of the places that agree so far falls below `suffix_min_token_prob`. Places are those of the
sequence itself and of other answers of its namespace, found by hash instead of in a tree.
"""

from __future__ import annotations

from engine.config import SpeculationOptions
from engine.speculation.base import OneByOne, Text
from engine.speculation.matching import Indexed, Match, Store

# A match of one token says next to nothing.
_LEAST = 2


class Suffix(OneByOne):
    """See the module."""

    def __init__(self, max_depth: int, max_answers: int, factor: float, least_share: float) -> None:
        self._limit = max(max_depth, _LEAST)
        self._factor = factor
        self._least_share = least_share
        self._store = Store(_LEAST, max_answers=max_answers)
        self._texts: dict[int, Indexed] = {}

    def start(self, slot: int, text: Text) -> None:
        """See Proposer."""
        self._texts[slot] = Indexed(text, _LEAST, self._store)

    def stop(self, slot: int) -> None:
        """See Proposer."""
        self._texts.pop(slot, None)

    def advance(self, slot: int, kept: int) -> None:
        """See Proposer."""
        self._texts[slot].advance(kept)

    def draft(self, slot: int, most: int) -> list[int]:
        """See OneByOne."""
        longest, found = 0, list[Match]()
        for match in self._texts[slot].matches(self._limit):
            if match.length > longest:
                longest, found = match.length, []
            if match.length == longest:
                found.append(match)
        return self._agreed(found, min(most, int(self._factor * longest)))

    def _agreed(self, places: list[Match], most: int) -> list[int]:
        """What most of the places go on with, of those the next token, and so on. Of equals the latest place's."""
        if not places or most <= 0:
            return []
        following = [match.tokens[match.end : match.end + most] for match in places]
        if following.count(following[0]) == len(following):
            return following[0]
        drafts: list[int] = []
        least = self._least_share * len(places)
        for at in range(most):
            counts: dict[int, int] = {}
            for tokens in following:
                if at < len(tokens):
                    counts[tokens[at]] = counts.get(tokens[at], 0) + 1
            # The first of equals, which stands first: the latest.
            token = max(counts, key=counts.__getitem__, default=-1)
            if not counts or counts[token] < least:
                break
            following = [tokens for tokens in following if at < len(tokens) and tokens[at] == token]
            drafts.append(token)
        return drafts


def make(options: SpeculationOptions) -> Suffix:
    """The proposer as it was asked for."""
    return Suffix(
        options.suffix_max_tree_depth,
        options.suffix_max_cached_requests,
        options.suffix_max_spec_factor,
        options.suffix_min_token_prob,
    )

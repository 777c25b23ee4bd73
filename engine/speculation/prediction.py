"""What a client predicts of its answer (OpenAI's `prediction`), followed as far as it is right.

After a difference the place is found again by the last tokens: a long match anywhere, a short one near the place
where the answer left the prediction.
"""

from __future__ import annotations

from bisect import bisect_left

from engine.speculation.base import OneByOne, Text
from engine.speculation.matching import common_suffix

# Tokens of a match that counts wherever it is; of a shorter one, the farthest that it may be from the old place.
_LONG, _NEAR = 4, 48
_LIMIT = 16
# Places of the last token that are looked at, to either side of the old one.
_MOST_PLACES = 64


class _Followed:
    """next: index of the predicted token that should come; None while the place is lost. left: where it was lost."""

    def __init__(self, text: Text, predicted: list[int]) -> None:
        self.text = text
        self.predicted = predicted
        self.next: int | None = 0
        self.left = 0
        self.seen = len(text.tokens)
        self.first = self.seen
        self._ends: dict[int, list[int]] = {}
        for index, token in enumerate(predicted):
            self._ends.setdefault(token, []).append(index + 1)

    def advance(self, kept: int) -> None:
        tokens = self.text.tokens
        if kept < self.seen:  # tokens were taken back
            self.next, self.left = None, self.left if self.next is None else self.next
            self.seen = len(tokens)
            if self.seen <= self.first:  # all of them
                self.next = 0
            return
        for index in range(self.seen, len(tokens)):
            place = self.next
            if place is None:
                break
            if place < len(self.predicted) and self.predicted[place] == tokens[index]:
                self.next = place + 1
            else:
                self.next, self.left = None, place
        self.seen = len(tokens)

    def find(self) -> None:
        """Be back where the last tokens stand, if they do."""
        tokens = self.text.tokens
        ends = self._ends.get(tokens[-1]) if tokens else None
        if not ends:
            return
        near = bisect_left(ends, self.left)
        best: tuple[int, int] | None = None
        for end in ends[max(0, near - _MOST_PLACES) : near + _MOST_PLACES]:
            length, distance = common_suffix(self.predicted, end, tokens, _LIMIT), abs(end - self.left)
            if (length >= _LONG or distance <= _NEAR) and (best is None or (length, -distance) > best):
                best = length, -distance
                self.next = end


class Prediction(OneByOne):
    """A proposer for the slots whose requests predict. See the module."""

    def __init__(self) -> None:
        self._slots: dict[int, _Followed] = {}

    def start(self, slot: int, text: Text) -> None:
        """See Proposer."""
        self._slots.pop(slot, None)
        if text.prediction is not None and len(text.prediction):
            self._slots[slot] = _Followed(text, text.prediction.tolist())

    def stop(self, slot: int) -> None:
        """See Proposer."""
        self._slots.pop(slot, None)

    def advance(self, slot: int, kept: int) -> None:
        """See Proposer."""
        if (followed := self._slots.get(slot)) is not None:
            followed.advance(kept)

    def draft(self, slot: int, most: int) -> list[int]:
        """See OneByOne."""
        followed = self._slots.get(slot)
        if followed is None:
            return []
        if followed.next is None:
            followed.find()
        if followed.next is None:
            return []
        return followed.predicted[followed.next : followed.next + most]

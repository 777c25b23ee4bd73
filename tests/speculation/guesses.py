"""Proposers of tests that know what is to come."""

from __future__ import annotations

from collections.abc import Callable

from engine.speculation.base import OneByOne, Text

WRONG = 3


class Following(OneByOne):
    """Has the text of each slot; what it drafts is for who makes one of it."""

    def __init__(self) -> None:
        self._texts: dict[int, Text] = {}

    def start(self, slot: int, text: Text) -> None:
        self._texts[slot] = text

    def stop(self, slot: int) -> None:
        del self._texts[slot]

    def advance(self, slot: int, kept: int) -> None:
        assert kept <= len(self._texts[slot].tokens)


class Guesses(Following):
    """Drafts how one of the known texts goes on, but WRONG in the places for which is_wrong is true, and where none of
    them does."""

    def __init__(self, texts: list[list[int]], is_wrong: Callable[[int], bool]) -> None:
        super().__init__()
        self._known, self._is_wrong = texts, is_wrong

    def draft(self, slot: int, most: int) -> list[int]:
        tokens = self._texts[slot].tokens
        at = len(tokens)
        right = next((known[at : at + most] for known in self._known if known[:at] == tokens), [WRONG] * most)
        return [WRONG if self._is_wrong(at + index) else token for index, token in enumerate(right)]

"""Reasoning, token by token: ReasoningWatch says where an output stands in it; Thinking holds it to a budget.

Made for one sequence each: the watch by the responder, which counts, and a Thinking as the TokenConstraint of a request
whose reasoning has a budget or is followed by a grammar. Loop thread.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

from engine.request import TokenConstraint
from engine.text.tokenizer import Tokenizer
from server.parsers.base import ReasoningFamily

# Text in front of a mark that is kept: longer than any token.
_KEPT = 64
# Tokens of newlines that may stand between a reasoning and the answer: models were trained to write one or two.
MAX_BLANKS = 2


class ReasoningWatch:
    """inside: the tokens so far end within the reasoning. is_over: what comes now is the answer.

    mark: which of the family's opening marks has begun it. num_tokens: tokens of the reasoning so far, its marks left
    out (of one that is spelled in several, the last).
    """

    __slots__ = (
        "_closes", "_ends", "_kept", "_many", "_opens", "_text", "_tokenizer", "inside", "is_over", "mark",
        "num_tokens",
    )  # fmt: skip

    def __init__(self, tokenizer: Tokenizer, family: ReasoningFamily, *, inside: bool) -> None:
        self._tokenizer = tokenizer
        self._opens = tuple(mark.encode() for mark in family.opens)
        self._closes = tuple(mark.encode() for mark in family.closes)
        self._ends = tuple(mark.encode() for mark in family.ends)
        self._kept = _KEPT + max(map(len, (*self._opens, *self._closes, *self._ends, b"")))
        self._many = family.whole
        self._text = b""
        self.inside = inside
        self.is_over = False
        self.mark = 0
        self.num_tokens = 0

    @property
    def is_whole(self) -> bool:
        """The tokens so far end with a whole character."""
        tail = self._text[-4:]
        for distance, byte in enumerate(reversed(tail), 1):
            if byte < 0x80:
                return True
            if byte >= 0xC0:
                return distance >= (2 if byte < 0xE0 else 3 if byte < 0xF0 else 4)
        return True

    def follow(self, token_ids: Iterable[int]) -> None:
        """The next tokens of the output."""
        for token_id in token_ids:
            self.accept(token_id)

    def accept(self, token_id: int) -> None:
        """The next token of the output."""
        if self.is_over and not self._many:
            return
        text = self._text = self._text + self._tokenizer.token_bytes(token_id)
        if self.inside:
            if any(end in text for end in self._ends):
                self.inside, self._text = False, b""
                self.is_over = not self._many
            else:
                self.num_tokens += 1
        elif self._many:
            if any(open in text for open in self._opens):
                self.inside, self._text = True, b""
            elif any(close in text for close in self._closes):
                self.is_over, self._text = True, b""
        else:
            # Reasoning is what the output begins with, or there is none.
            begun = text.lstrip()
            self.inside = begun.startswith(self._opens)
            self.is_over = not self.inside and not any(open.startswith(begun) for open in self._opens)
            if self.inside:
                self.mark = next(place for place, open in enumerate(self._opens) if begun.startswith(open))
                self._text = b""
        self._text = self._text[-self._kept :]


class Thinking:
    """A TokenConstraint: everything may follow while the model reasons, and behind it what `grammar` allows.

    grammar: None where the answer is free. open_id: the output begins with this token, the first of the reasoning, or
    with the grammar at once; None where the watch alone says. budget: after that many tokens of reasoning `closing`
    is forced, once the character that they end in is whole; None for no limit. more_closings: the same for the opening
    marks behind the first. blanks: tokens of newlines that the
    model may write between the end of its reasoning and what the grammar allows.
    """

    __slots__ = (
        "_answering", "_blanks", "_blanks_left", "_broken", "_budget", "_closings", "_forced", "_grammar", "_open_id",
        "_watch",
    )  # fmt: skip

    def __init__(
        self,
        watch: ReasoningWatch,
        grammar: TokenConstraint | None,
        *,
        open_id: int | None = None,
        budget: int | None = None,
        closing: Sequence[int] = (),
        more_closings: Sequence[Sequence[int]] = (),
        blanks: frozenset[int] = frozenset(),
    ) -> None:
        self._watch = watch
        self._blanks = blanks
        self._blanks_left = 0
        self._grammar = grammar
        self._open_id = open_id
        self._budget = budget
        self._closings = (closing, *more_closings)
        self._forced: Sequence[int] = ()
        self._answering = False
        self._broken = False
        self._keep_to_budget()

    @property
    def is_free(self) -> bool:
        if self._answering:
            return self._grammar is None or self._grammar.is_free
        return not self._forced and self._open_id is None

    @property
    def is_finished(self) -> bool:
        return self._answering and self._grammar is not None and self._grammar.is_finished

    @property
    def error(self) -> str | None:
        if self._broken:
            return "the end of its reasoning is a token that it forbids itself"
        return self._grammar.error if self._answering and self._grammar is not None else None

    def mask_into(self, mask: Any) -> None:
        first: int | None = self._open_id
        if self._forced:
            mask.fill(0)
            first = self._forced[0]
        elif self._grammar is None or self.is_free:
            mask.fill(0xFFFFFFFF)
            return
        else:
            self._grammar.mask_into(mask)
            if self._blanks_left:
                for blank in self._blanks:
                    mask[blank >> 5] |= 1 << (blank & 31)
        if first is not None:
            mask[first >> 5] |= 1 << (first & 31)

    def forced_tokens(self) -> Sequence[int]:
        if self._answering and self._grammar is not None:
            return () if self._blanks_left else self._grammar.forced_tokens()
        return self._forced

    def accept(self, token_id: int) -> None:
        open_id, self._open_id = self._open_id, None
        if open_id is not None and token_id != open_id:
            self._answering = True
        if self._answering:
            if self._blanks_left and token_id in self._blanks and not self._is_own(token_id):
                self._blanks_left -= 1
                return
            self._blanks_left = 0
            if self._grammar is not None:
                self._grammar.accept(token_id)
            return
        self._watch.accept(token_id)
        if self._forced:
            # What is written behind the mark belongs to the reasoning too.
            self._broken = token_id != self._forced[0]
            self._forced = self._forced[1:]
            self._answering = not self._forced
            return
        self._answering = self._watch.is_over
        if self._answering and self._grammar is not None and self._blanks:
            self._blanks_left = MAX_BLANKS
        self._keep_to_budget()

    def _is_own(self, blank: int) -> bool:
        """The grammar allows it here as well: it is the answer's."""
        if self._grammar is None or (forced := self._grammar.forced_tokens()):
            return self._grammar is not None and forced[0] == blank
        trial = self._grammar.copy()
        trial.accept(blank)
        return trial.error is None

    def copy(self) -> Thinking:
        other = copy.copy(self)
        other._watch = copy.copy(self._watch)
        other._grammar = None if self._grammar is None else self._grammar.copy()
        return other

    def _keep_to_budget(self) -> None:
        watch = self._watch
        if self._budget is not None and watch.inside and watch.num_tokens >= self._budget and watch.is_whole:
            self._forced = self._closings[watch.mark]

"""Grammar: a compiled spec, shared. GrammarState: where one sequence stands in it; belongs to the loop."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from llguidance import LLMatcher
from numpy.typing import NDArray

from engine.text.grammar.spec import GrammarSpec, sentence

# Forced tokens that one step appends: a longer run would hold up the loop, by some microseconds a token.
MAX_FORCED_TOKENS = 256


class Grammar:
    """A compiled GrammarSpec, shared by every sequence that uses it; changed by nobody.

    warnings: what of a schema that is not strict is left to the model, one sentence each.
    """

    __slots__ = ("_can_force", "_forced", "_matcher", "spec", "warnings")

    def __init__(self, spec: GrammarSpec, matcher: LLMatcher, warnings: Sequence[str], can_force: bool) -> None:
        self.spec = spec
        self.warnings = tuple(warnings)
        self._matcher = matcher
        self._can_force = can_force
        # A text may begin with a long run, and here no loop waits for it.
        self._forced: list[int] = matcher.compute_ff_tokens() if can_force else []

    def state(self) -> GrammarState:
        """A state at the beginning, one for each sequence."""
        return GrammarState(self._matcher.deep_copy(), self._can_force, self._forced)


class GrammarState:
    """Where one sequence stands in its grammar. All calls take microseconds and belong to one thread.

    For each row and step: `mask_into` before its token is sampled, `accept` with the token that was. When
    `is_finished`, nothing but an EOS can follow, so the sequence may end without one.
    """

    is_free = False

    __slots__ = ("_can_force", "_forced", "_matcher", "_num_taken")

    def __init__(self, matcher: LLMatcher, can_force: bool, forced: list[int]) -> None:
        self._matcher = matcher
        self._can_force = can_force
        # A forced run and how far it has come: kept, so that it is the same whether its tokens are accepted at once or
        # one by one, and because finding one takes 0.4 us a character.
        self._forced = forced
        self._num_taken = 0

    @property
    def is_finished(self) -> bool:
        """The text is complete and only an EOS could follow."""
        return self._matcher.is_stopped()

    @property
    def is_accepting(self) -> bool:
        """The text so far is a complete one, whether or not it may go on."""
        return self._matcher.is_accepting()

    @property
    def error(self) -> str | None:
        """Why no further token can be judged: a token that the mask forbids, or a grammar that grew too complex."""
        return sentence(self._matcher.get_error()) if self._matcher.is_error() else None

    def mask_into(self, out: NDArray[np.uint32]) -> None:
        """Write the allowed tokens: bit i of word w is token 32 w + i. out: uint32[ceil(V / 32)], contiguous."""
        if forced := self.forced_tokens():
            out.fill(0)
            out[forced[0] >> 5] = 1 << (forced[0] & 31)
        else:
            self._matcher.unsafe_compute_mask_ptr(out.ctypes.data, out.nbytes)

    def accept(self, token_id: int) -> None:
        """Go on by the token that was sampled (an EOS too). One that the mask forbids sets `error`."""
        self._matcher.consume_token(token_id)
        if self._num_taken < len(self._forced) and self._forced[self._num_taken] == token_id:
            self._num_taken += 1
        else:
            self._forced, self._num_taken = [], 0

    def forced_tokens(self) -> list[int]:
        """Tokens that the grammar leaves no choice about, to be appended (and accepted) without a forward.

        Only where the tokenizer would cut the forced text in the same way whatever follows it; else empty. At most
        MAX_FORCED_TOKENS: what is left of a longer run follows when these are accepted.
        """
        if self._num_taken == len(self._forced) and self._can_force:
            self._forced, self._num_taken = self._matcher.compute_ff_tokens(), 0
        return self._forced[self._num_taken : self._num_taken + MAX_FORCED_TOKENS]

    def copy(self) -> GrammarState:
        """An independent state at the same place."""
        copy = GrammarState(self._matcher.deep_copy(), self._can_force, self._forced)
        copy._num_taken = self._num_taken
        return copy

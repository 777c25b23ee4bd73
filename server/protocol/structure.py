"""What every choice of a request must look like: a compiled grammar, and where in the output it begins to rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engine.request import RequestError, SamplingParams, TokenConstraint
from engine.text.structured import Grammar, GrammarSpec
from engine.text.tokenizer import Tokenizer
from server.parsers.base import ReasoningFamily
from server.protocol.body import invalid
from server.state import State


@dataclass(frozen=True, slots=True)
class Structure:
    """after: everything is allowed until the model has written this. open_id: it may begin with this token, the
    first of a reasoning that ends with `after`; without it the grammar rules from the start."""

    grammar: Grammar
    after: bytes | None = None
    open_id: int | None = None

    def state(self, tokenizer: Tokenizer | None) -> TokenConstraint:
        """A state of its own for one sequence."""
        later = self.grammar.state(after=self.after, tokenizer=tokenizer)
        if self.open_id is None:
            return later
        return _MayReason(self.grammar.state(), later, self.open_id)


class _MayReason:
    """A grammar that may be preceded by reasoning: the first token says which of two states it is."""

    __slots__ = ("_later", "_open_id", "_state")

    def __init__(self, at_once: TokenConstraint, later: TokenConstraint, open_id: int) -> None:
        self._state = at_once
        self._later: TokenConstraint | None = later
        self._open_id = open_id

    @property
    def is_free(self) -> bool:
        return self._state.is_free

    @property
    def is_finished(self) -> bool:
        return self._state.is_finished

    @property
    def error(self) -> str | None:
        return self._state.error

    def mask_into(self, mask: Any) -> None:
        self._state.mask_into(mask)
        if self._later is not None:
            mask[self._open_id >> 5] |= 1 << (self._open_id & 31)

    def accept(self, token_id: int) -> None:
        later, self._later = self._later, None
        if later is not None and token_id == self._open_id:
            self._state = later
        else:
            self._state.accept(token_id)


async def make_structure(
    state: State,
    sampling: SamplingParams,
    spec: GrammarSpec | None,
    *,
    reasoning: ReasoningFamily | None = None,
    prompt: str = "",
) -> Structure | None:
    """Compile what a request asks for. reasoning: how the model thinks before it, if it may; prompt: what it goes on.

    Raises RequestError for what makes no usable grammar, and for fields that would fight with one.
    """
    if spec is None:
        return None
    if state.compiler is None:
        raise RequestError("This model has no token that ends a text, which a grammar needs.", param=spec.param)
    if sampling.clash is not None:
        raise invalid(sampling.clash, "cannot be combined with structured output or a forced tool call")
    grammar = await state.compiler.compile_async(spec)
    if reasoning is None or not reasoning.close:
        return Structure(grammar)
    after = reasoning.close.encode()
    if reasoning.whole or reasoning.starts_inside(prompt):
        return Structure(grammar, after)
    open_id = state.tokenizer.token_to_id(reasoning.open)
    if open_id is None or prompt.rstrip().endswith(reasoning.close):
        # It has been told not to think, or would need several tokens to begin.
        return Structure(grammar)
    return Structure(grammar, after, open_id)

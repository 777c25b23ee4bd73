"""What every choice of a request must look like: a compiled grammar, and where in the output it begins to rule."""

from __future__ import annotations

from dataclasses import dataclass

from engine.request import RequestError, SamplingParams, TokenConstraint
from engine.text.grammar.spec import GrammarSpec
from engine.text.grammar.state import Grammar
from engine.text.tokenizer import Tokenizer
from server.parsers.base import ReasoningFamily, ReasoningState
from server.protocol.body import invalid
from server.protocol.thinking import ReasoningWatch, Thinking
from server.state import State


@dataclass(frozen=True, slots=True)
class Structure:
    """grammar: None where only the reasoning is limited. reasoning: what may come before the answer; None for nothing.

    inside: the prompt has opened it. open_id, budget, blanks: see Thinking. closings: for each opening mark.
    """

    grammar: Grammar | None
    reasoning: ReasoningFamily | None = None
    inside: bool = False
    open_id: int | None = None
    budget: int | None = None
    closings: tuple[tuple[int, ...], ...] = ((),)
    blanks: frozenset[int] = frozenset()

    def state(self, tokenizer: Tokenizer | None) -> TokenConstraint:
        """A state of its own for one sequence."""
        grammar = None if self.grammar is None else self.grammar.state()
        if self.reasoning is None:
            assert grammar is not None
            return grammar
        assert tokenizer is not None, "reasoning is text"
        watch = ReasoningWatch(tokenizer, self.reasoning, inside=self.inside)
        closing, *more = self.closings
        return Thinking(
            watch,
            grammar,
            open_id=self.open_id,
            budget=self.budget,
            closing=closing,
            more_closings=more,
            blanks=self.blanks,
        )


async def make_structure(
    state: State,
    sampling: SamplingParams,
    spec: GrammarSpec | None,
    *,
    reasoning: ReasoningFamily | None = None,
    thinking: ReasoningState = "none",
    budget: int | None = None,
) -> Structure | None:
    """Compile what a request asks for. reasoning: how the model thinks before it, if it may; thinking: where the
    prompt leaves it in that, with the mark that is open as the family's first; budget: most tokens of reasoning.

    Raises RequestError for what makes no usable grammar, and for fields that would fight with one.
    """
    if reasoning is not None and (not reasoning.close or thinking == "over"):
        reasoning = None  # it has been told not to think, or it has done so
    grammar = None if spec is None else await _compile(state, sampling, spec)
    if reasoning is None or (grammar is None and budget is None):
        return None if grammar is None else Structure(grammar)
    tokenizer, inside = state.tokenizer, thinking == "inside"
    open_id = None
    if grammar is not None and not reasoning.whole and not inside:
        open_id = tokenizer.token_to_id(reasoning.open)
        if open_id is None:
            # It would need several tokens to begin.
            return Structure(grammar)
    closings: tuple[tuple[int, ...], ...] = ((),)
    if budget is not None:
        closings = tuple(tuple(tokenizer.encode(text, add_special_tokens=False)) for text in reasoning.closings)
    blanks = _newlines(tokenizer) if grammar is not None and not reasoning.whole else frozenset[int]()
    return Structure(grammar, reasoning, inside, open_id, budget, closings, blanks)


def _newlines(tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that the tokenizer makes of one newline or two behind a text."""
    ids = {token_id for text in ("x\n", "x\n\n") for token_id in tokenizer.encode(text, add_special_tokens=False)}
    return frozenset(token_id for token_id in ids if set(tokenizer.token_bytes(token_id)) == {ord("\n")})


async def _compile(state: State, sampling: SamplingParams, spec: GrammarSpec) -> Grammar:
    if state.compiler is None:
        raise RequestError("This model has no token that ends a text, which a grammar needs.", param=spec.param)
    if sampling.clash is not None:
        raise invalid(sampling.clash, "cannot be combined with structured output or a forced tool call")
    return await state.compiler.compile_async(spec)

"""Makes the model say a text of the test's choice, through the whole server.

A constraint that allows one token a step stands in front of whatever the request itself asks for, so that sampling,
detokenising, parsing and all API families run as they do for a real answer. The texts that parsers are tried on are
said whole (as the tokenizer would cut them) and one character a token.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from engine.request import Request, TokenConstraint
from engine.stream import TokenStream
from tests.server.support import Live, tokenizer

Cut = Literal["whole", "characters"]
CUTS: tuple[Cut, ...] = ("whole", "characters")


@functools.lru_cache(64)
def tokens_of(text: str, cut: Cut) -> tuple[int, ...]:
    """The tokens that say a text; special tokens are said as one token either way."""
    model = tokenizer()
    if cut == "whole":
        return tuple(model.encode(text, add_special_tokens=False))
    specials = sorted(filter(None, (model.id_to_token(i) for i in model.special_ids)), key=len, reverse=True)
    ids: list[int] = []
    at = 0
    while at < len(text):
        piece = next((name for name in specials if text.startswith(name, at)), text[at])
        ids += model.encode(piece, add_special_tokens=False)
        at += len(piece)
    return tuple(ids)


class Dictation:
    """A TokenConstraint that allows one token a step, then an EOS where `ends`, and free text where not.

    inner: the request's own constraint, which follows what is said but rules nothing.
    """

    is_free = False
    error = None

    def __init__(self, tokens: Sequence[int], *, eos: int, ends: bool = True, inner: TokenConstraint | None = None):
        self._tokens = [*tokens, eos] if ends else list(tokens)
        self._at = 0
        self._inner = inner

    @property
    def is_finished(self) -> bool:
        return self._at >= len(self._tokens)

    def copy(self) -> Dictation:
        other = copy.copy(self)
        other._inner = None  # it only follows what is said
        return other

    def mask_into(self, mask: Any) -> None:
        token = self._tokens[self._at]
        mask.fill(0)
        mask[token >> 5] = 1 << (token & 31)

    def forced_tokens(self) -> Sequence[int]:
        return ()

    def accept(self, token_id: int) -> None:
        assert token_id == self._tokens[self._at], "a token was sampled that the mask forbade"
        self._at += 1
        if self._inner is not None and self._inner.error is None and not self._inner.is_finished:
            self._inner.accept(token_id)


@contextlib.contextmanager
def dictated(
    server: Live, *texts: str, say: Callable[[str], str] | None = None, cut: Cut = "whole", ends: bool = True
) -> Iterator[list[Request]]:
    """Every request inside says the next of the texts (the last one over and over), then ends.

    say: chooses the text by the prompt instead. Yields the requests as they come, as the engine gets them. A request
    that is cut short by its max_tokens says as much of its text as fits.
    """
    assert bool(texts) != bool(say), "either texts or a way to choose them"
    seen: list[Request] = []
    submit = server.engine.submit

    def dictate(request: Request) -> TokenStream:
        if say is not None:
            text = say(tokenizer().decode(request.prompt_token_ids))
        else:
            text = texts[min(len(seen), len(texts) - 1)]
        seen.append(request)
        constraint = Dictation(
            tokens_of(text, cut), eos=tokenizer().eos_token_ids[0], ends=ends, inner=request.constraint
        )
        return submit(dataclasses.replace(request, constraint=constraint))

    server.engine.submit = dictate  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        server.engine.submit = submit  # type: ignore[method-assign]

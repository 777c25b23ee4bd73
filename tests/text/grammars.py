"""Grammars for tests: compilers over small tokenizers, answers sampled under their masks, values held against them."""

from __future__ import annotations

import functools
import json
import random
import re
from typing import Any

import numpy as np

from engine.text.grammar.compiler import GrammarCompiler
from engine.text.grammar.spec import GrammarSpec, Kind
from engine.text.grammar.state import Grammar, GrammarState
from engine.text.tokenizer import Tokenizer
from tests.text import kinds

EOS = 2
LARK = 'start: "SELECT " NAME ("," NAME)* " FROM " NAME\nNAME: /[a-z]{1,8}/'
SOFT_STEPS, MOST_STEPS = 60, 1500


@functools.cache
def words(kind: str = "byte_level") -> Tokenizer:
    return kinds.load(kind)


@functools.cache
def compiler(kind: str = "byte_level") -> GrammarCompiler:
    # The logits are wider than the vocabulary, as padded embeddings are.
    tokenizer = words(kind)
    return GrammarCompiler(tokenizer, [EOS, 3], tokenizer.vocab_size + 17)


def allowed(state: GrammarState, made: GrammarCompiler) -> list[int]:
    mask = np.zeros(made.mask_words, np.uint32)
    state.mask_into(mask)
    found: list[int] = np.unpackbits(mask.view(np.uint8), bitorder="little").nonzero()[0].tolist()
    return found


def walk(
    grammar: Grammar, rng: random.Random, kind: str = "byte_level", force: bool = False, closing: bytes = b""
) -> tuple[str, list[int]]:
    """Sample under the masks until the end; after a while whatever closes is preferred, `closing` first."""
    made, tokenizer = compiler(kind), words(kind)
    state = grammar.state()
    ids: list[int] = []
    data = b""
    for step in range(MOST_STEPS):
        if state.is_finished:
            break
        if force:
            for token in state.forced_tokens():
                assert token in allowed(state, made)
                state.accept(token)
                ids.append(token)
                data += tokenizer.token_bytes(token)
            if state.is_finished:
                break
        options = allowed(state, made)
        assert options and max(options) < tokenizer.vocab_size
        if EOS in options and (step > SOFT_STEPS or rng.random() < 0.3):
            break
        options = [token for token in options if token not in tokenizer.special_ids]
        if not options:
            break
        if step > SOFT_STEPS or rng.random() < 0.25:
            in_string = len(re.findall(rb'(?<!\\)(?:\\\\)*"', data)) % 2 == 1
            closers = (b'"',) if in_string else (b"}", b"]")
            if closing:
                begun = max(size for size in range(len(closing)) if data.endswith(closing[:size]))
                closers = (closing[begun : begun + 1],)
            options = [token for token in options if tokenizer.token_bytes(token) in closers] or options
        token = rng.choice(options)
        assert state.error is None
        state.accept(token)
        assert state.error is None
        ids.append(token)
        data += tokenizer.token_bytes(token)
    else:
        raise AssertionError(f"no end: {data[-200:]!r}")
    assert state.is_accepting
    return data.decode(), ids


def spec(kind: Kind, value: Any, **more: Any) -> GrammarSpec:
    return GrammarSpec(kind, value if isinstance(value, str) else json.dumps(value), **more)


def admits(grammar: Grammar, value: Any) -> bool:
    state = grammar.state()
    for token in words().encode(json.dumps(value, ensure_ascii=False), add_special_tokens=False):
        state.accept(token)
        if state.error is not None:
            return False
    return state.is_accepting

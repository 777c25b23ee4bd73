"""Structural tags: what stands between them, and tokens that have no text."""

from __future__ import annotations

import random
import re

from tests.text.grammars import LARK, allowed, compiler, spec, walk, words


def test_structural_tags() -> None:
    schema = {
        "type": "object",
        "properties": {"x": {"type": "integer"}},
        "required": ["x"],
        "additionalProperties": False,
    }
    tag = {"begin": "<fn=f>", "content": {"type": "json_schema", "json_schema": schema}, "end": "</fn>"}
    tree = {
        "type": "triggered_tags",
        "triggers": ["<fn="],
        "tags": [tag, {**tag, "begin": "<fn=g>"}],
        "at_least_one": True,
        "stop_after_first": True,
    }
    grammar = compiler().compile(spec("structural_tag", tree))
    state = grammar.state()
    for token in words().encode("Some text first.\n<fn=", add_special_tokens=False):
        state.accept(token)
    assert state.error is None
    assert {words().token_bytes(token)[:1] for token in allowed(state, compiler())} <= {b"f", b"g"}
    for token in words().encode('g>{"x": 12}</fn>', add_special_tokens=False):
        state.accept(token)
    assert state.error is None and state.is_finished
    separated = {"type": "tags_with_separator", "tags": [tag], "separator": "\n", "at_least_one": True}
    sequence = {
        "type": "sequence",
        "elements": [{"type": "const_string", "value": "go "}, {"type": "regex", "pattern": "^[ab]+$"}, separated],
    }
    grammar = compiler().compile(spec("structural_tag", sequence))
    for seed in range(10):
        text, _ = walk(grammar, random.Random(seed))
        assert re.fullmatch(r'go [ab]+(<fn=f>\{\s*"x"\s*:\s*-?\d+\s*\}</fn>\n?)+', text)
    either = {
        "type": "or",
        "elements": [{"type": "grammar", "grammar": LARK}, {"type": "const_string", "value": "none"}],
    }
    grammar = compiler().compile(spec("structural_tag", either))
    assert {walk(grammar, random.Random(seed))[0][:4] for seed in range(20)} == {"SELE", "none"}
    free = {"type": "tag", "begin": "<a>", "content": {"type": "any_text"}, "end": "</a>"}
    grammar = compiler().compile(spec("structural_tag", free))
    state = grammar.state()
    for token in words().encode("<a>what < ever</a>", add_special_tokens=False):
        state.accept(token)
    assert state.error is None and state.is_finished


def test_special_tokens_are_named_in_tags_only() -> None:
    tag = {"type": "const_string", "value": "a<|im_end|>b"}
    state = compiler().compile(spec("structural_tag", tag)).state()
    special = words().token_to_id("<|im_end|>")
    assert special is not None
    for token in (
        *words().encode("a", add_special_tokens=False),
        special,
        *words().encode("b", add_special_tokens=False),
    ):
        assert token in allowed(state, compiler())
        state.accept(token)
    assert state.is_finished
    # A client's text never becomes one.
    grammar = compiler().compile(spec("choice", ["a<|im_end|>b", "a</s>b"]))
    for seed in range(10):
        assert not words().special_ids.intersection(walk(grammar, random.Random(seed), force=True)[1])

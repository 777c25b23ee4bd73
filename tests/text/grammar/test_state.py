"""Where a sequence stands in its grammar: its end, copies, and forced tokens."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

import engine.demo
from engine.text.grammar.compiler import GrammarCompiler
from engine.text.tokenizer import Tokenizer
from tests.text.grammars import EOS, allowed, compiler, spec, words


def test_ends_and_copies() -> None:
    grammar = compiler().compile(spec("choice", ["ab", "ac"]))
    state = grammar.state()
    ids = words().encode("a", add_special_tokens=False)
    state.accept(ids[0])
    copy = state.copy()
    state.accept(words().encode("b", add_special_tokens=False)[0])
    assert state.is_finished and not copy.is_finished
    assert set(allowed(state, compiler())) == {EOS, 3}
    assert set(allowed(copy, compiler())) == {words().encode(letter, add_special_tokens=False)[0] for letter in "bc"}
    state.accept(EOS)
    assert state.is_finished and state.error is None
    copy.accept(words().encode("z", add_special_tokens=False)[0])
    assert copy.error is not None
    assert grammar.state().error is None


def test_forced_tokens_are_what_the_tokenizer_says() -> None:
    """Jump-ahead gives the ids of the text as the tokenizer cuts it."""
    value = {
        "type": "object",
        "properties": {"a_long_property_name": {"const": "the cat sat on the mat"}},
        "required": ["a_long_property_name"],
        "additionalProperties": False,
    }
    for kind in ("byte_level", "byte_fallback_no_strip"):
        state = compiler(kind).compile(spec("json_schema", value, any_whitespace=False)).state()
        ids: list[int] = []
        while not state.is_finished:
            forced = state.forced_tokens()
            for token in forced or [random.Random(0).choice(allowed(state, compiler(kind)))]:
                state.accept(token)
                ids.append(token)
            assert state.error is None
        text = b"".join(map(words(kind).token_bytes, ids)).decode()
        assert json.loads(text) == {"a_long_property_name": "the cat sat on the mat"}
        assert len(ids) <= len(words(kind).encode(text, add_special_tokens=False)) + 3


DOCUMENT = {
    "a_long_property_name": "the cat sat on the mat",
    "größe": [1, 22, 333],
    "nested object": {"the dog": True, "日本": None, "x": -1.5e3},
}


def schema_of(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        inner = {name: schema_of(child) for name, child in value.items()}
        return {"type": "object", "properties": inner, "required": list(value), "additionalProperties": False}
    if isinstance(value, list):
        return {"type": "array", "items": schema_of(value[0])}
    names = {bool: "boolean", type(None): "null", int: "integer", float: "number", str: "string"}
    return {"type": names[type(value)]}


@pytest.mark.parametrize("kind", ["demo", "byte_level", "byte_fallback", "byte_fallback_no_strip"])
@pytest.mark.parametrize("layout", [{"separators": (",", ":")}, {}, {"indent": 2}], ids=["tight", "plain", "indented"])
def test_forced_tokens_are_those_of_the_whole_text(kind: str, layout: dict[str, Any]) -> None:
    """Where the model picks what the tokenizer would, so does the grammar; and one by one they are the same."""
    tokenizer = Tokenizer.load(Path(engine.demo.__path__[0])) if kind == "demo" else words(kind)
    made = GrammarCompiler(tokenizer, [EOS], tokenizer.vocab_size)
    text = json.dumps(DOCUMENT, ensure_ascii=False, **layout)
    # Behind a byte that merges with nothing: as in the middle of a chat, no space stands before the first word.
    lead = tokenizer.encode("\x02", add_special_tokens=False)
    ids = tokenizer.encode("\x02" + text, add_special_tokens=False)[len(lead) :]
    tight = "separators" in layout
    state = made.compile(spec("json_schema", schema_of(DOCUMENT), any_whitespace=not tight)).state()
    place = num_forced = 0
    while not state.is_finished:
        forced = list(state.forced_tokens())
        assert forced == ids[place : place + len(forced)]
        num_forced += len(forced)
        for index, token in enumerate(forced or ids[place : place + 1]):
            assert list(state.forced_tokens())[: len(forced) - index] == forced[index:]
            if forced:
                assert allowed(state, made) == [token]
            state.accept(token)
            place += 1
        assert state.error is None
    assert place == len(ids) and num_forced > len(ids) / (2 if tight else 5)


def test_a_tokenizer_that_changes_texts_forces_nothing() -> None:
    assert compiler("byte_level").warm()
    assert not compiler("unigram").warm()
    state = compiler("unigram").compile(spec("choice", ["the cat", "the dog"])).state()
    assert state.forced_tokens() == []

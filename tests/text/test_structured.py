"""Grammars: whatever is sampled under the masks parses and validates, and bad specs are one request's 400."""

from __future__ import annotations

import asyncio
import functools
import json
import random
import re
import time
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

import engine.demo
from engine.request import RequestError
from engine.text import structured
from engine.text.structured import Grammar, GrammarCompiler, GrammarSpec, GrammarState, Kind
from engine.text.tokenizer import Tokenizer
from tests.text import kinds
from tests.text.schemas import SCHEMAS

EOS = 2
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


def test_there_are_enough_schemas() -> None:
    assert len(SCHEMAS) >= 300
    assert len({json.dumps(schema) for schema in SCHEMAS}) >= 300


@pytest.mark.parametrize("number", range(len(SCHEMAS)))
def test_what_is_sampled_is_valid(number: int) -> None:
    schema = SCHEMAS[number]
    validator = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    checker = validator(schema, format_checker=validator.FORMAT_CHECKER)
    grammar = compiler().compile(spec("json_schema", schema))
    assert grammar.warnings == ()
    rng = random.Random(number)
    for attempt in range(3):
        text, _ = walk(grammar, rng, force=attempt == 2)
        checker.validate(json.loads(text))


# ---- other kinds


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "byte_fallback_no_strip", "byte_level_regex"])
def test_every_kind_of_tokenizer(kind: str) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "é": {"enum": ["x", "日本"]}},
        "required": ["name", "é"],
    }
    grammar = compiler(kind).compile(spec("json_schema", schema))
    for seed in range(10):
        text, ids = walk(grammar, random.Random(seed), kind, force=seed % 2 == 0)
        jsonschema.validate(json.loads(text), schema)
        assert text.encode() == b"".join(map(words(kind).token_bytes, ids))


def test_json_object() -> None:
    grammar = compiler().compile(GrammarSpec("json_object"))
    for seed in range(20):
        assert isinstance(json.loads(walk(grammar, random.Random(seed))[0]), dict)


@pytest.mark.parametrize(
    "pattern", [r"\d{3}-\d{4}", r"^[a-c]+$", "a|bc", r"\w+@\w+\.com", "é+", r"a\$", "/x/", r"(yes|no)\n?"]
)
def test_regex(pattern: str) -> None:
    grammar = compiler().compile(GrammarSpec("regex", pattern))
    for seed in range(10):
        assert re.fullmatch(pattern, walk(grammar, random.Random(seed))[0])


@pytest.mark.parametrize(
    "choices",
    [
        ["yes", "no"],
        ["a", "ab", "abc"],
        ["日本", "</s>", 'q"', "\n", "a\\b", "<tool_call>"],
        [f"c{i}" for i in range(999)],
    ],
)
def test_choice(choices: list[str]) -> None:
    grammar = compiler().compile(spec("choice", choices))
    seen = {walk(grammar, random.Random(seed), force=seed % 2 == 0)[0] for seed in range(30)}
    assert seen <= set(choices) and len(seen) > 1


LARK = 'start: "SELECT " NAME ("," NAME)* " FROM " NAME\nNAME: /[a-z]{1,8}/'
GBNF = 'root ::= "SELECT " name ("," name)* " FROM " name\nname ::= [a-z] [a-z]*'


@pytest.mark.parametrize("text", [LARK, GBNF])
def test_grammar(text: str) -> None:
    grammar = compiler().compile(GrammarSpec("grammar", text))
    for seed in range(10):
        assert re.fullmatch(r"SELECT [a-z]+(,[a-z]+)* FROM [a-z]+", walk(grammar, random.Random(seed))[0])


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


# ---- layout


def test_whitespace() -> None:
    value = {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2}
    compact = compiler().compile(spec("json_schema", value, any_whitespace=False))
    spaced = compiler().compile(spec("json_schema", value, whitespace_pattern=" "))
    for seed in range(10):
        assert not re.search(r"\s", walk(compact, random.Random(seed))[0])
        assert not re.search(r"[\n\t]|  ", walk(spaced, random.Random(seed))[0])


def test_whitespace_ends() -> None:
    """A model that loves blanks is stopped."""
    state = compiler().compile(GrammarSpec("json_object")).state()
    [brace], [blank] = words().encode("{", add_special_tokens=False), words().encode("\n", add_special_tokens=False)
    state.accept(brace)
    count = 0
    while blank in allowed(state, compiler()):
        state.accept(blank)
        count += 1
    assert 20 <= count <= 64


# ---- states


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


# ---- refusals

REWRITTEN: list[tuple[Any, list[Any], list[Any]]] = [
    (True, [1, "a", {}], []),
    ({"not": {"type": "string"}}, [1, None, {}, [], True], ["a"]),
    ({"not": {"type": ["object", "array"]}}, [1, "a"], [{}, []]),
    ({"type": "string", "not": {"enum": ["ab", "ac", ""]}}, ["a", "abc", "b", "é"], ["ab", "ac", ""]),
    ({"type": "integer", "not": {"const": 3}}, [2, 4, -9], [3]),
    ({"not": {"required": ["a", "b"]}, "type": "object"}, [{}, {"a": 1}, {"b": 1}], [{"a": 1, "b": 2}]),
    ({"type": "object", "not": {"anyOf": [{"required": ["a"]}, {"required": ["b"]}]}}, [{}, {"c": 1}], [{"a": 1}]),
    (
        {"type": "object", "required": ["k"], "not": {"properties": {"k": {"const": "x"}}}},
        [{"k": "y"}, {"k": 1}],
        [{"k": "x"}],
    ),
    ({"not": {"not": {"type": "string"}}}, ["a"], [1]),
    ({"oneOf": [{"required": ["a"]}, {"required": ["b"]}], "type": "object"}, [{"a": 1}], [{"a": 1, "b": 1}, {}]),
    ({"oneOf": [{"type": "integer", "maximum": 3}, {"minimum": 2, "type": "integer"}]}, [1, 4], [2, 3]),
    ({"type": "object", "dependentRequired": {"a": ["b"]}}, [{}, {"a": 1, "b": 1}, {"b": 1}], [{"a": 1}]),
    ({"type": "object", "dependencies": {"a": ["b"]}}, [{}, {"a": 1, "b": 1}], []),
    (
        {"type": "object", "dependentSchemas": {"a": {"properties": {"b": {"type": "string"}}}}},
        [{"b": 1}, {"a": 1, "b": "x"}],
        [{"a": 1, "b": 1}],
    ),
    (
        {
            "type": "object",
            "properties": {"k": {"enum": ["s", "i"]}, "v": {}},
            "required": ["k", "v"],
            "if": {"properties": {"k": {"const": "s"}}},
            "then": {"properties": {"v": {"type": "string"}}},
            "else": {"properties": {"v": {"type": "integer"}}},
        },
        [{"k": "s", "v": "x"}, {"k": "i", "v": 1}],
        [{"k": "s", "v": 1}, {"k": "i", "v": "x"}],
    ),
    ({"type": "array", "contains": {"const": 1}}, [[1], [2, 1], [2, 3, 1, 4]], [[], [2]]),
    ({"type": "array", "contains": {"type": "string"}, "maxContains": 1}, [["a"], [1, "a", 2]], [[1], ["a", "b"]]),
    ({"type": "array", "contains": {"const": 1}, "minContains": 2}, [[1, 1], [1, 2, 1]], [[1]]),
    ({"type": "array", "minContains": 3}, [[]], []),
    (
        {"type": "array", "items": {"enum": ["a", "b", "c"]}, "uniqueItems": True},
        [[], ["b"], ["c", "a"], ["b", "c", "a"]],
        [["a", "a"], ["a", "b", "a"]],
    ),
    ({"type": "array", "items": {"type": "boolean"}, "uniqueItems": True}, [[True, False]], [[True, True]]),
    ({"type": "array", "uniqueItems": True, "maxItems": 1}, [[1], []], [[1, 2]]),
    ({"type": "array", "uniqueItems": False}, [[1, 1]], []),
    ({"type": "object", "propertyNames": {"type": "string"}}, [{"a": 1}], []),
    ({"type": "object", "propertyNames": {"enum": ["a", "b"]}}, [{"a": 1}, {}], [{"c": 1}]),
    ({"type": "object", "propertyNames": {"pattern": "^a"}, "additionalProperties": {"type": "integer"}},
     [{"ab": 1}, {}], [{"b": 1}, {"a": "x"}]),
    ({"type": "object", "propertyNames": {"maxLength": 2}, "properties": {"abc": {}, "a": {"type": "null"}}},
     [{"ab": 1}, {"a": None}], [{"abc": 1}, {"a": 1}]),
    ({"type": "object", "properties": {"a": {}}, "unevaluatedProperties": False}, [{"a": 1}], [{"b": 1}]),
    (
        {"type": "object", "allOf": [{"properties": {"a": {}}}], "properties": {"b": {}}}
        | {"unevaluatedProperties": False},
        [{"b": 1, "a": 1}],
        [{"c": 1}],
    ),
    ({"unevaluatedProperties": True, "if": {"type": "string"}, "type": "integer"}, [1], ["a"]),
    ({"type": "string", "minLength": 2.0, "maxLength": 3.0}, ["ab"], ["a", "abcd"]),
    ({"$id": "http://x/y", "$defs": {"a": {"$id": "a.json", "type": "integer"}}, "$ref": "a.json"}, [1], ["a"]),
    ({"$ref": "#here", "$defs": {"a": {"$anchor": "here", "type": "integer"}}, "maximum": 3}, [3], [4]),
    ({"type": "object", "properties": {"a": {}, "b": {}}, "minProperties": 1}, [{"a": 1}, {"b": 1}], [{}]),
    ({"type": "string", "pattern": "^(?!ab).*$"}, ["", "a", "ac", "xab"], ["ab", "abc"]),
    ({"type": "string", "not": {"pattern": "^ab"}}, ["", "a", "ac", "xab"], ["ab", "abc"]),
    ({"type": "integer", "minLength": 4}, [1], ["abcd"]),
    ({"type": "object", "not": {"const": {"a": 1}}}, [{}, {"b": 1}], [{"a": 1}]),
    ({"type": "object", "required": ["a"], "minProperties": 2}, [{"a": 1, "b": 1}], [{"a": 1}]),
]  # fmt: skip
# Each with the keyword and the place that the sentence names.
UNENFORCEABLE: list[tuple[dict[str, Any], str, str]] = [
    ({"type": "array", "items": {"type": "string"}, "uniqueItems": True}, "uniqueItems", "uniqueItems"),
    (
        {"properties": {"tags": {"type": "array", "items": {"type": "string"}, "uniqueItems": True}}},
        "uniqueItems",
        "properties.tags.uniqueItems",
    ),
    ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "oneOf", "oneOf"),
    ({"type": "string", "pattern": "^(?=a)b"}, "pattern", "pattern"),
    ({"properties": {"a": {"pattern": "(?<!x)b"}}}, "pattern", "properties.a.pattern"),
    ({"type": "object", "patternProperties": {"(?=a)": {}}}, "patternProperties", "patternProperties"),
    ({"$ref": "https://example.com/schema.json"}, "$ref", "$ref"),
    ({"properties": {"a": {"$ref": "file:///etc/passwd"}}}, "$ref", "properties.a.$ref"),
    ({"$dynamicRef": "http://x/y"}, "$dynamicRef", "$dynamicRef"),
    ({"not": {"type": "integer", "multipleOf": 3}, "type": "integer"}, "multipleOf", "not"),
    ({"type": "object", "propertyNames": {"pattern": "^a", "minLength": 4}}, "propertyNames", "propertyNames"),
    # Free names may come twice, and would be counted so.
    ({"type": "object", "minProperties": 2}, "minProperties", "minProperties"),
    ({"type": "object", "not": {"maxProperties": 2}}, "maxProperties", "not"),
]


@pytest.mark.parametrize("schema, keyword, place", UNENFORCEABLE)
def test_what_cannot_be_enforced(schema: dict[str, Any], keyword: str, place: str) -> None:
    """An error for who insists, which names the keyword and its place; a warning for who does not."""
    with pytest.raises(RequestError) as error:
        compiler().compile(spec("json_schema", schema, param="here"))
    assert error.value.status == 400 and error.value.param == "here"
    assert f"`{keyword}`" in str(error.value) and f"`{place}`" in str(error.value)
    grammar = compiler().compile(spec("json_schema", schema, strict=False))
    assert any(f"`{keyword}`" in warning for warning in grammar.warnings)
    json.loads(walk(grammar, random.Random(1))[0])


@pytest.mark.parametrize("schema, valid, invalid", REWRITTEN)
def test_what_is_rewritten(schema: Any, valid: list[Any], invalid: list[Any]) -> None:
    """Keywords that the library lacks: values are held to them, and not to more than is said."""
    grammar = compiler().compile(spec("json_schema", schema))
    assert grammar.warnings == ()
    checker = jsonschema.Draft202012Validator(schema)
    for seed in range(4):
        checker.validate(json.loads(walk(grammar, random.Random(seed))[0]))
    for values, expected in ((valid, True), (invalid, False)):
        for value in values:
            assert checker.is_valid(value) is expected
            assert admits(grammar, value) is expected, value


def admits(grammar: Grammar, value: Any) -> bool:
    state = grammar.state()
    for token in words().encode(json.dumps(value, ensure_ascii=False), add_special_tokens=False):
        state.accept(token)
        if state.error is not None:
            return False
    return state.is_accepting


@pytest.mark.parametrize("pattern", ["(?=x)y", "^(?<name>a)\\k<name>$"])
def test_one_pattern_that_cannot_be_held_leaves_the_others(pattern: str) -> None:
    inner = {"a": {"type": "string", "pattern": "^[0-9]{3}$"}, "b": {"type": "string", "pattern": pattern}}
    schema = {"type": "object", "properties": inner, "required": ["a", "b"], "additionalProperties": False}
    grammar = compiler().compile(spec("json_schema", schema, strict=False))
    assert grammar.warnings
    assert admits(grammar, {"a": "123", "b": "anything"}) and not admits(grammar, {"a": "12", "b": "anything"})


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "patternProperties": {"^.{1,255}$": {}}},
        {"type": "string", "pattern": "^(?:\\S+\\s+){0,49}\\S+$", "maxLength": 500},
    ],
)
def test_what_grows_too_complex_shows_it_at_the_door(schema: dict[str, Any]) -> None:
    """Taken or refused, but never taken and failed in the middle of an answer."""
    for strict in (True, False):
        try:
            grammar = compiler().compile(spec("json_schema", schema, strict=strict))
        except RequestError:
            assert strict
            continue
        for seed in range(5):
            walk(grammar, random.Random(seed))


def deep(levels: int) -> dict[str, Any]:
    return {"items": deep(levels - 1)} if levels else {}


def chain(links: int) -> dict[str, Any]:
    steps = {
        f"a{i}": {"type": "object", "properties": {"x": {"$ref": f"#/$defs/a{i + 1}"}}, "required": ["x"]}
        for i in range(links)
    }
    return {"$ref": "#/$defs/a0", "$defs": {**steps, f"a{links}": {"type": "integer"}}}


REFUSED: list[tuple[Kind, Any]] = [
    ("json_schema", "not json"),
    ("json_schema", "[]"),
    ("json_schema", "3"),
    ("json_schema", "false"),
    ("json_schema", '"\ud800"'),
    ("json_schema", {"type": "strin"}),
    ("json_schema", {"minimum": "x"}),
    ("json_schema", {"properties": {"a": 3}}),
    ("json_schema", {"properties": {"a": [1]}}),
    ("json_schema", {"anyOf": [None]}),
    ("json_schema", {"enum": []}),
    ("json_schema", {"type": "integer", "minimum": 5, "maximum": 4}),
    ("json_schema", {"type": "string", "pattern": "(a"}),
    ("json_schema", {"type": "string", "maxLength": -1}),
    ("json_schema", {"required": ["a"], "type": "object", "properties": {"a": False}}),
    ("json_schema", {"$ref": "https://example.com/schema.json"}),
    ("json_schema", {"$ref": "other.json#/a"}),
    ("json_schema", {"$ref": 3}),
    ("json_schema", {"properties": {"a": {"$ref": "file:///etc/passwd"}}}),
    ("json_schema", {"$ref": "#/$defs/missing"}),
    ("json_schema", {"$dynamicRef": "http://x/#a"}),
    ("json_schema", {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}),
    ("json_schema", deep(80)),
    ("json_schema", chain(1500)),
    ("json_schema", "[" * 100_000 + "]" * 100_000),
    ("json_schema", {"anyOf": [{"const": index} for index in range(6000)]}),
    ("json_schema", {"enum": ["x" * 300_000]}),
    ("json_schema", {"allOf": [{"type": "string", "pattern": f"a{{{index}}}"} for index in range(30)]}),
    ("regex", "(a"),
    ("regex", "(?=a)b"),
    ("regex", "a{2,1}"),
    ("regex", "(" * 5000 + ")" * 5000),
    ("regex", "a" * 100_000),
    ("choice", "[]"),
    ("choice", "{}"),
    ("choice", '["a", 3]'),
    ("choice", '[""]'),
    ("choice", json.dumps(["a"] * 9000)),
    ("grammar", " "),
    ("grammar", "start: missing"),
    ("grammar", 'root ::= "a" | other'),
    ("grammar", 'root ::= "a'),
    ("grammar", "root ::= ("),
    ("grammar", "start: " + "(" * 3000 + '"a"' + ")" * 3000),
    ("grammar", "root ::= " + "(" * 3000 + '"a"' + ")" * 3000),
    ("grammar", "\n".join(["root ::= a0", *(f"a{i} ::= a{i + 1}" for i in range(600)), 'a600 ::= "x"'])),
    ("grammar", 'start: "a"\n' * 8000),
    ("grammar", 'start: "' + "a" * 70_000 + '"'),
    ("grammar", "start: start"),
    ("structural_tag", "3"),
    ("structural_tag", {}),
    ("structural_tag", {"type": "sequence"}),
    ("structural_tag", {"type": "sequence", "elements": [3]}),
    ("structural_tag", {"type": "magic"}),
    ("structural_tag", {"type": "const_string"}),
    ("structural_tag", {"type": "regex", "pattern": ""}),
    ("structural_tag", {"type": "tag", "begin": "a"}),
    ("structural_tag", {"type": "tag", "begin": 3, "content": {"type": "any_text"}, "end": ""}),
    ("structural_tag", {"type": "triggered_tags", "triggers": [], "tags": []}),
    (
        "structural_tag",
        {
            "type": "triggered_tags",
            "triggers": ["x"],
            "tags": [{"begin": "y", "content": {"type": "any_text"}, "end": ""}],
        },
    ),
    ("structural_tag", {"type": "json_schema"}),
    ("structural_tag", {"type": "json_schema", "json_schema": {"$ref": "http://x"}}),
]


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_refusals(number: int) -> None:
    kind, value = REFUSED[number]
    begun = time.perf_counter()
    with pytest.raises(RequestError) as error:
        compiler().compile(spec(kind, value, param="here"))
    assert time.perf_counter() - begun < 1.0
    message = str(error.value)
    assert error.value.status == 400 and message.endswith(".") and len(message) < 400 and "\n" not in message


# ---- off the loop


async def test_compiling_on_the_loop_is_cached_and_shared() -> None:
    made = GrammarCompiler(words(), [EOS], words().vocab_size, cache_entries=2)
    try:
        first, second = await asyncio.gather(*(made.compile_async(spec("json_schema", SCHEMAS[0])) for _ in range(2)))
        assert first is second is await made.compile_async(spec("json_schema", SCHEMAS[0], param="another"))
        for value in ("a", "b"):
            await made.compile_async(spec("choice", [value]))
        assert await made.compile_async(spec("json_schema", SCHEMAS[0])) is not first
        with pytest.raises(RequestError, match="regular expression"):
            await made.compile_async(GrammarSpec("regex", "("))
        with pytest.raises(RequestError):
            await made.compile_async(GrammarSpec("regex", "("))
    finally:
        made.close()


async def test_deep_rules_do_not_end_the_process() -> None:
    """The library recurses along them; on a thread of the usual size this is a crash."""
    made = GrammarCompiler(words(), [EOS], words().vocab_size)
    try:
        rules = "\n".join(["start: a0", *(f"a{i}: a{i + 1}" for i in range(4500)), 'a4500: "x"'])
        assert len(rules) < structured.MAX_GRAMMAR_CHARACTERS
        grammar = await made.compile_async(GrammarSpec("grammar", rules))
        state = grammar.state()
        state.accept(words().encode("x", add_special_tokens=False)[0])
        assert state.is_finished
    finally:
        made.close()


async def test_a_compilation_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    made = GrammarCompiler(words(), [EOS], words().vocab_size, timeout_s=0.1)
    quick = made.compile

    def compile(spec: GrammarSpec) -> Grammar:
        if spec.text == "slow":
            time.sleep(0.6)
        return quick(spec)

    monkeypatch.setattr(made, "compile", compile)
    made.warm()
    try:
        slow = [made.compile_async(GrammarSpec("regex", "slow", param=str(number))) for number in range(3)]
        results = await asyncio.gather(*slow, return_exceptions=True)
        assert all(isinstance(result, RequestError) and "longer than 0.1 s" in str(result) for result in results)
        # Another thread has taken over.
        assert (await made.compile_async(GrammarSpec("regex", "quick"))).warnings == ()
        await asyncio.sleep(0.6)
        assert (await made.compile_async(GrammarSpec("regex", "slow"))).warnings == ()
    finally:
        made.close()


async def test_the_loop_runs_on_while_a_hundred_compile() -> None:
    made = GrammarCompiler(words(), [EOS], words().vocab_size)
    made.warm()
    times: list[float] = []
    running = True

    async def tick() -> None:
        while running:
            begun = time.perf_counter()
            await asyncio.sleep(0.001)
            times.append(time.perf_counter() - begun)

    ticker = asyncio.create_task(tick())
    try:
        await asyncio.gather(*(made.compile_async(spec("json_schema", schema)) for schema in SCHEMAS[-100:]))
        running = False
        await ticker
        # 20 ms is what is aimed at; a busy machine gets some slack.
        assert sorted(times)[-2] < 0.2
    finally:
        made.close()

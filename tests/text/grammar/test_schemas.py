"""JSON schemas: whatever is sampled under the masks parses and validates."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import jsonschema
import pytest

from engine.request import RequestError
from engine.text.grammar.spec import GrammarSpec
from tests.text.grammars import admits, allowed, compiler, spec, walk, words
from tests.text.schemas import SCHEMAS


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


@pytest.mark.parametrize("pattern", ["(?<=x)y", "^(?<name>a)\\k<name>$"])
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

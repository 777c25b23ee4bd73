"""Random schemas of the keywords that are rewritten: what strict takes is never answered wrongly, nor takes long."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest

from engine.request import RequestError
from tests.text.test_structured import compiler, spec, walk

NUM_BATCHES, PER_BATCH = 8, 40


def made(rng: random.Random, depth: int) -> Any:
    """A schema that may say anything, sense or nonsense."""
    if depth == 0:
        kinds = ["string", "integer", "number", "boolean", "null", "object", "array"]
        plain = [True, False, {"type": rng.choice(kinds)}, {"const": rng.choice([1, "a", None, {"a": 1}])}]
        return rng.choice([*plain, {"enum": ["a", "b", 1]}])

    def inner() -> Any:
        return made(rng, depth - 1)

    def name() -> str:
        return rng.choice("abc")

    keywords: dict[str, Callable[[], Any]] = {
        "type": lambda: rng.choice(["string", "object", "array", ["integer", "null"], "number"]),
        "enum": lambda: ["a", 1, None, {}, []],
        "not": inner,
        "oneOf": lambda: [inner() for _ in range(rng.randint(1, 3))],
        "anyOf": lambda: [inner(), inner()],
        "allOf": lambda: [inner(), inner()],
        "if": inner,
        "then": inner,
        "else": inner,
        "properties": lambda: {name(): inner(), name(): inner()},
        "patternProperties": lambda: {rng.choice(["^a", "b$"]): inner()},
        "additionalProperties": inner,
        "unevaluatedProperties": lambda: rng.choice([True, False, {"type": "string"}]),
        "propertyNames": lambda: rng.choice([{"pattern": "^a"}, {"enum": ["a", "b"]}, {"maxLength": 2}]),
        "required": lambda: [name()],
        "dependentRequired": lambda: {name(): [name()]},
        "dependentSchemas": lambda: {name(): inner()},
        "minProperties": lambda: rng.randint(0, 2),
        "maxProperties": lambda: rng.randint(0, 3),
        "items": inner,
        "prefixItems": lambda: [inner()],
        "contains": inner,
        "uniqueItems": lambda: rng.random() < 0.5,
        "minItems": lambda: rng.randint(0, 2),
        "maxItems": lambda: rng.randint(0, 3),
        "minimum": lambda: rng.randint(0, 4),
        "maximum": lambda: rng.randint(2, 6),
        "minLength": lambda: rng.randint(0, 3),
        "pattern": lambda: rng.choice(["^a", "^ab$", "b"]),
        "$ref": lambda: "#/$defs/d",
    }
    return {key: keywords[key]() for key in rng.sample(list(keywords), rng.randint(1, 4))}


@pytest.mark.parametrize("batch", range(NUM_BATCHES))
def test_random_schemas(batch: int) -> None:
    num_taken = 0
    for number in range(batch * PER_BATCH, (batch + 1) * PER_BATCH):
        rng = random.Random(number)
        schema = {"$defs": {"d": made(rng, 1)}, "allOf": [made(rng, rng.randint(1, 2))]}
        checker = jsonschema.Draft202012Validator(schema)
        for strict in (False, True):
            begun = time.perf_counter()
            try:
                grammar = compiler().compile(spec("json_schema", schema, strict=strict))
            except RequestError:
                grammar = None
            assert time.perf_counter() - begun < 5, schema
        if grammar is None:
            continue
        num_taken += 1
        for seed in range(2):
            value = json.loads(walk(grammar, random.Random(seed))[0])
            assert checker.is_valid(value), (schema, value)
    assert num_taken > PER_BATCH / 3

#!/usr/bin/env bash
# lm-format-enforcer 0.11.3 (MIT): each choice of a "oneOf" is read as the properties of an object, whatever it is. Where the
# choices are no objects (an integer or null, as OpenAPI's converters write it) the mask has an opening brace and blanks:
# what was to be a number can only be an object, and no answer is valid. Where they are references (pydantic writes a union
# with a discriminator so) these are not followed, and what is left is an object of any kind: the mask says nothing of the
# discriminator nor of any field. The same union without a discriminator is written as "anyOf" and is held to its types, and
# choices that are objects written on the spot are right. Nothing is said when the schema is read.
# So whoever compiles clients' schemas by it turns oneOf into anyOf first.
#
# Seen: of a number or null the valid answers are refused; of a union with a discriminator the letters that may come at
# each place of a valid answer are those of {"type": "object"}. With anyOf both are right. Exits with 1 when this has changed.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile lm-format-enforcer==0.11.3 pydantic==2.14.4 jsonschema==4.26.0
"$dir/venv/bin/python" - <<'PY'
import json
from typing import Annotated, Literal

import jsonschema
from lmformatenforcer import JsonSchemaParser
from pydantic import BaseModel, Field


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(BaseModel):
    kind: Literal["dog"]
    tricks: int


class Discriminated(BaseModel):
    pet: Annotated[Cat | Dog, Field(discriminator="kind")]


class Plain(BaseModel):
    pet: Cat | Dog


def masks(schema, text):
    """The letters that may come at each place of a valid text, up to the first place where its own letter may not."""
    assert jsonschema.Draft202012Validator(schema).is_valid(json.loads(text))
    parser, seen = JsonSchemaParser(schema), []
    for letter in text:
        seen.append(frozenset(parser.get_allowed_characters()))
        if letter not in seen[-1]:
            break
        parser = parser.add_character(letter)
    return seen


def of_pet(**schema):
    return {"type": "object", "properties": {"pet": schema}, "required": ["pet"]}


choices = [{"type": "integer"}, {"type": "null"}]
for text in ('{"pet":7}', '{"pet":null}'):
    by_one, by_any = masks(of_pet(oneOf=choices), text), masks(of_pet(anyOf=choices), text)
    print(f"{text}: oneOf ends behind {text[: len(by_one) - 1]}, where {sorted(by_one[-1])} may come; anyOf: {text[: len(by_any)]}")
    assert len(by_one) - 1 == len('{"pet":') and by_one[-1] == frozenset("{ \t\n\r") and len(by_any) == len(text)

discriminated, plain = Discriminated.model_json_schema(), Plain.model_json_schema()
assert "oneOf" in discriminated["properties"]["pet"] and "anyOf" in plain["properties"]["pet"]
spelled = of_pet(oneOf=[plain["$defs"][name] for name in ("Cat", "Dog")])
text = '{"pet":{"kind":"dog","tricks":2}}'
of_any = masks(of_pet(type="object"), text)
for name, schema in {"with a discriminator": discriminated, "without": plain, "objects on the spot": spelled}.items():
    seen = masks(schema, text)
    print(f"{name}: {len(seen)} letters of {len(text)}, the masks of any object: {seen == of_any}")
    assert len(seen) == len(text) and (seen == of_any) == (name == "with a discriminator")
PY

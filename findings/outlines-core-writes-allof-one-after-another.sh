#!/usr/bin/env bash
# outlines_core 0.2.14 (Apache-2.0), which makes the regular expressions of outlines, and of vLLM and SGLang where outlines is
# their backend: "allOf" of a JSON Schema, which says that one value must be all of these, becomes these values one behind
# the other. An object type that extends another (an OpenAPI generator writes it so) can only be answered with two objects
# in a row, which is no JSON: whatever the model does, the client's parser fails, and the object with both properties, which
# is what the schema asks for, is refused in any order. An allOf of one is right, which is what most examples have.
# Nothing is said when the schema is compiled. A server with this backend refuses such schemas itself.
#
# Seen: the expression of two types is those of the types joined, and matches neither order of the object that jsonschema
# takes; by reference as well. Exits with 1 when this has changed.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile outlines_core==0.2.14 jsonschema==4.26.0
"$dir/venv/bin/python" - <<'PY'
import json
import re

import jsonschema
from outlines_core.json_schema import build_regex_from_schema

number = {"type": "integer"}
one = {"type": "object", "properties": {"a": number}, "required": ["a"]}
two = {"type": "object", "properties": {"b": number}, "required": ["b"]}
named = {"allOf": [{"$ref": "#/$defs/one"}, {"$ref": "#/$defs/two"}], "$defs": {"one": one, "two": two}}


def expression(schema):
    return build_regex_from_schema(json.dumps(schema))


def check(name, schema, texts, matches):
    assert all(jsonschema.Draft202012Validator(schema).is_valid(json.loads(text)) for text in texts)
    seen = [re.fullmatch(expression(schema), text) is not None for text in texts]
    print(f"{name}: {dict(zip(texts, seen))}")
    assert seen == [matches] * len(texts)


both = ['{"a": 1, "b": 2}', '{"b": 2, "a": 1}', '{"a":1,"b":2}']
check("allOf of one", {"allOf": [one]}, ['{"a": 1}', '{"a":1}'], True)
check("allOf of two", {"allOf": [one, two]}, both, False)
check("allOf of two references", named, both, False)
print("allOf of two:", expression({"allOf": [one, two]}))
assert expression({"allOf": [one, two]}) == expression(named) == f"({expression(one)}{expression(two)})"
PY

#!/usr/bin/env bash
# llguidance 1.9.1 (MIT): minProperties counts the members that are written, not the properties of the object. Where
# additional properties are allowed, {"a":1,"a":1} ends an object that must have two, and json.loads makes one property
# of it: an answer that was held to a schema does not validate against it.
#
# Seen: with minProperties 2 the grammar refuses {"a":1} and accepts {"a":1,"a":1}, which is {"a": 1} once it is read.
# Exits with 1 when this has changed.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet llguidance==1.9.1
"$dir/venv/bin/python" - <<'PY'
import json
from llguidance import LLMatcher, LLTokenizer

tokenizer = LLTokenizer("byte")
schema = {"type": "object", "minProperties": 2, "additionalProperties": {"type": "integer"}}


def accepts(text):
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_json_schema(json.dumps(schema)))
    tokens = tokenizer.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


seen = {text: accepts(text) for text in ('{"a":1}', '{"a":1,"a":1}', '{"a":1,"b":1}')}
for text, answer in seen.items():
    print(f"{text:<15} accepted: {answer!s:<5} read as {json.loads(text)}")
assert list(seen.values()) == [False, True, True]
PY

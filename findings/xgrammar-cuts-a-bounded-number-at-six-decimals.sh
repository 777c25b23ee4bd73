#!/usr/bin/env bash
# xgrammar 0.2.9 (Apache-2.0), the grammar library that vLLM and SGLang take first: a "number" of JSON Schema that has any
# bound (minimum, maximum, exclusiveMinimum, exclusiveMaximum) may have six decimals at the most, and no exponent. Without
# bounds it may have both. So a bound that seems to change nothing, 0 to 1 for a probability or -90 to 90 for a latitude,
# takes digits from the answer: the mask ends 0.1234567 at 0.123456, and of 3e-7 there remain 0 and 0.000001.
# Nothing is said when the schema is compiled.
#
# Seen: each of these numbers is within its schema's bounds; those that need a seventh decimal or an exponent are refused,
# and all are accepted where the schema is {"type": "number"}. Exits with 1 when this has changed.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile xgrammar==0.2.9 transformers==5.24.0 torch==2.13.0 numpy
"$dir/venv/bin/python" - <<'PY'
import json
import xgrammar

tokenizer = xgrammar.TokenizerInfo([bytes([number]) for number in range(256)] + [b"<end>"], stop_token_ids=[256])
compiler = xgrammar.GrammarCompiler(tokenizer)


def accepts(schema, text):
    matcher = xgrammar.GrammarMatcher(compiler.compile_json_schema(json.dumps({"type": "number", **schema})))
    return matcher.accept_string(text) and matcher.accept_token(256)


cases = (
    ({"minimum": 0, "maximum": 1}, {"0.123456": True, "0.1234567": False, "3e-7": False, "0.0000003": False}),
    ({"minimum": -90, "maximum": 90}, {"48.858370": True, "48.8583701": False}),
    ({"exclusiveMinimum": 0}, {"0.000001": True, "0.0000003": False, "1e-3": False, "10000000001": True, "1e10": False}),
)
for schema, expected in cases:
    seen = {text: accepts(schema, text) for text in expected}
    print(json.dumps(schema), seen)
    assert seen == expected and all(accepts({}, text) for text in expected)
PY

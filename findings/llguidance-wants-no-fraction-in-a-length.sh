#!/usr/bin/env bash
# llguidance 1.9.1 (MIT): "minLength": 2.0 is an error, and so are maxLength, minItems, maxItems, minProperties and
# maxProperties of that form, though for JSON Schema 2.0 is the integer 2 (draft 6 and later) and JavaScript and several
# generators of schemas write it so. "minimum": 2.0 is taken. A server that compiles clients' schemas by it refuses valid
# ones, unless it turns such numbers into integers first.
#
# Seen: each keyword with 2 compiles, with 2.0 it does not; minimum compiles with both. Exits with 1 when this has changed.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet llguidance==1.9.1
"$dir/venv/bin/python" - <<'PY'
import json
from llguidance import LLMatcher, LLTokenizer

tokenizer = LLTokenizer("byte")


def problem(kind, keyword, value):
    grammar = LLMatcher.grammar_from_json_schema(json.dumps({"type": kind, keyword: value}))
    return LLMatcher(tokenizer, grammar).get_error().partition("\n")[0]


kinds = {"Length": "string", "Items": "array", "Properties": "object"}
for kind, keyword in [(kinds[what], least + what) for what in kinds for least in ("min", "max")]:
    whole, fraction = problem(kind, keyword, 2), problem(kind, keyword, 2.0)
    print(f"{keyword}: 2 -> {whole or 'compiles'}; 2.0 -> {fraction or 'compiles'}")
    assert not whole and fraction
print(f"minimum: 2.0 -> {problem('integer', 'minimum', 2.0) or 'compiles'}")
assert not problem("integer", "minimum", 2.0)
PY

#!/usr/bin/env bash
# llguidance 1.9.1 (MIT): exclusiveMinimum lets its own bound in where that is a whole number and the upper bound lies
# less than one above it. A number above 0 and at most 0.5 may be written as 0, and one between 1 and 1.5 as 1: an
# answer that was held to a schema does not validate against it. With an upper bound of 1 or 2 all is well.
#
# Seen: with exclusiveMinimum 0 the grammar accepts 0 beside maximum 0.5, and refuses it beside maximum 1.
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


def accepts(low, high, text):
    schema = {"type": "number", "exclusiveMinimum": low, "maximum": high}
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_json_schema(json.dumps(schema)))
    tokens = tokenizer.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


seen = {}
for low, high in ((0, 0.5), (0, 1), (1, 1.5), (1, 2)):
    seen[low, high] = accepts(low, high, str(low))
    print(f"above {low} and at most {high}: {low} is accepted: {seen[low, high]}")
assert list(seen.values()) == [True, False, True, False]
PY

#!/usr/bin/env bash
# transformers 5.24.0 and tokenizers 0.23.3 (Apache-2.0): a token that only tokenizer_config.json knows, in
# added_tokens_decoder, is given the next free id and not the one under which it stands there. Where ids in between are
# unused (an embedding with room to spare, tokens added by hand), the text of the token becomes another id than the one
# that the model was trained with, and the model's own id decodes to nothing. Nothing is said of it.
#
# Seen: a vocabulary of 4 ids, <far> declared as 9: it gets id 4, and id 9 has no token.
# Exits with 1 when this has changed.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet transformers==5.24.0 tokenizers==0.23.3
cd "$dir"
HF_HUB_OFFLINE=1 "$dir/venv/bin/python" - 2>/dev/null <<'PY'
import json
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer

Tokenizer(WordLevel({"a": 0, "b": 1, "c": 2, "[UNK]": 3}, unk_token="[UNK]")).save("tokenizer.json")
rest = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
added = {"9": {"content": "<far>", "special": True, **rest}}
json.dump({"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": added}, open("tokenizer_config.json", "w"))
found = AutoTokenizer.from_pretrained(".")
print("declared:", {number: token["content"] for number, token in added.items()})
print("<far> is encoded as", found.encode("<far>"), "and id 9 is", found.convert_ids_to_tokens(9))
assert found.encode("<far>") == [4] and found.convert_ids_to_tokens(9) is None
PY

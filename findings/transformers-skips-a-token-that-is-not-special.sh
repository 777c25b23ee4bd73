#!/usr/bin/env bash
# transformers 5.24.0 and tokenizers 0.23.3 (Apache-2.0): tokenizer_config.json says in added_tokens_decoder that a token
# is not special, tokenizer.json says that it is. The tokenizer that is loaded shows special=False for it, and decode
# with skip_special_tokens=True still leaves it out. The other way round the configuration wins: a token that only
# it calls special is left out. So what added_tokens_decoder shows does not say what decode will do.
#
# Seen: <s> is shown as not special and is left out; <tool>, made special by the configuration, is left out, too.
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

made = Tokenizer(WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
made.add_special_tokens(["<s>"])
made.add_tokens(["<tool>"])
made.save("tokenizer.json")


def load(**special):
    rest = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    added = {number[1:]: {"content": content, "special": value, **rest} for number, (content, value) in special.items()}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": added}
    json.dump(config, open("tokenizer_config.json", "w"))
    found = AutoTokenizer.from_pretrained(".")
    shown = {str(token): token.special for token in found.added_tokens_decoder.values()}
    text = found.decode([0, 3, 4, 1], skip_special_tokens=True)
    print(special or "as made", "-> special:", shown, "decoded:", repr(text))
    return shown, text


assert load() == ({"<s>": True, "<tool>": False}, "a <tool> b")
assert load(_3=("<s>", False)) == ({"<s>": False, "<tool>": False}, "a <tool> b")
assert load(_4=("<tool>", True)) == ({"<s>": True, "<tool>": True}, "a b")
PY

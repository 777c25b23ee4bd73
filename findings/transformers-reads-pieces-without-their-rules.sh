#!/usr/bin/env bash
# transformers 5.24.0 (Apache-2.0): a SentencePiece tokenizer.model holds, beside the pieces, how text is to be prepared for
# them: the table of its normaliser, whether runs of spaces shrink, whether a space is put in front. Where
# tokenizer_config.json says LlamaTokenizer (the class of many models that are no Llama), the pieces and their merges are
# read, and none of that: text is never normalised, spaces stay, and a space is put in front, though the file says no.
# Under the name PreTrainedTokenizerFast the very same file is read with its rules. So the same words have other
# ids than the model was trained with, without a word; add_prefix_space in the configuration mends the space alone.
#
# Seen, a model that SentencePiece trains with its defaults: "two  spaces" and a full-width letter have other ids under
# LlamaTokenizer, and SentencePiece's own under the other name. One trained with add_dummy_prefix=False and no normaliser:
# every text gets a space in front. Exits with 1 when this has changed.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile transformers==5.24.0 tokenizers==0.23.3 sentencepiece==0.2.3 protobuf
cd "$dir"
HF_HUB_OFFLINE=1 "$dir/venv/bin/python" - 2>/dev/null <<'PY'
import json
from pathlib import Path

import sentencepiece
from transformers import AutoTokenizer

words = "the river mill stone bridge water house green light night day sun moon".split()
lines = [" ".join(words[(i * 7 + j * 3 + i * j) % len(words)] for j in range(6)) for i in range(400)]


def compare(folder, texts, **rules):
    """Which of the texts have SentencePiece's ids under LlamaTokenizer; under the other name all must."""
    Path(folder).mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=f"{folder}/tokenizer", model_type="bpe", vocab_size=320,
        hard_vocab_limit=False, byte_fallback=True, minloglevel=2, **rules,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file=f"{folder}/tokenizer.model")
    found = {}
    for name in ("LlamaTokenizer", "PreTrainedTokenizerFast"):
        Path(folder, "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
        found[name] = AutoTokenizer.from_pretrained(folder)
    same = []
    for text in texts:
        right = pieces.encode(text)
        ids = {name: tokenizer(text, add_special_tokens=False)["input_ids"] for name, tokenizer in found.items()}
        assert ids["PreTrainedTokenizerFast"] == right
        same.append(ids["LlamaTokenizer"] == right)
        other = found["LlamaTokenizer"].convert_ids_to_tokens(ids["LlamaTokenizer"])
        print(f"{folder}: {text!r} {pieces.encode(text, out_type=str)} LlamaTokenizer: {'the same' if same[-1] else other}")
    return same


assert compare("defaults", ["the river", "the  river", "the river ", "the ｒiver"]) == [True, False, False, False]
assert compare(
    "plain", ["the river", "the  river"],
    normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
) == [False, False]
PY

#!/usr/bin/env bash
# transformers 5.24.0 (Apache-2.0): T5Tokenizer, the class of mT5 as well, builds its own Unigram model with byte_fallback
# off, whatever the file says. A SentencePiece vocabulary that was trained with it has a token for each of the 256 bytes,
# so that every character has ids; here a character without a piece of its own becomes <unk>, and its text is gone: all
# of them look alike to the model. A tokenizer.json that says "byte_fallback": true is not believed either, of it the
# vocabulary alone is kept. Spaces and line ends go the same way: runs of them become one space each, also where the file
# keeps them apart. Nothing is said; the tokenizers library with the same file has the other ids.
#
# Seen: a vocabulary without digits. SentencePiece encodes "river 9" with the byte <0x39> and decodes it to "river 9"; both
# tokenizers that transformers loads have <unk> and give back "river <unk>". "the\n\nriver" comes back as "the river".
# Exits with 1 when this has changed.
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
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

words = "the river mill stone bridge water house green light night day sun moon".split()
lines = [" ".join(words[(i * 7 + j * 3 + i * j) % len(words)] for j in range(6)) for i in range(400)]
for folder in ("model", "json"):
    Path(folder).mkdir()
    Path(folder, "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 0}))
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(lines), model_prefix="model/spiece", model_type="unigram", vocab_size=320, hard_vocab_limit=False,
    byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
    pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
)
pieces = sentencepiece.SentencePieceProcessor(model_file="model/spiece.model")
vocabulary = [(pieces.id_to_piece(number), pieces.get_score(number)) for number in range(pieces.get_piece_size())]
made = Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=True))
made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")])
made.save("json/tokenizer.json")

by_model, by_json = AutoTokenizer.from_pretrained("model"), AutoTokenizer.from_pretrained("json")
for text, back in (("river mill", "river mill"), ("river 9", "river <unk>"), ("the\n\nriver", "the river")):
    right = pieces.encode(text)
    library = made.encode(text, add_special_tokens=False).ids
    print(repr(text), "sentencepiece:", pieces.encode(text, out_type=str), "tokenizers the same:", library == right)
    assert library == right and pieces.decode(right) == text
    for tokenizer in (by_model, by_json):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        decoded = tokenizer.decode(ids)
        print(f"    {type(tokenizer).__name__}: {tokenizer.convert_ids_to_tokens(ids)} -> {decoded!r}")
        assert decoded == back and (ids == right) == (back == text)
PY

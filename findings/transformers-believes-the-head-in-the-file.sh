#!/usr/bin/env bash
# transformers 5.24.0 (Apache-2.0): config.json says tie_word_embeddings: true, and the checkpoint holds an lm_head.weight
# that is not the embedding. The word of the configuration does not win: the stored head is used, with a warning. A loader
# that ties because it was told to answers with other log-probabilities and says nothing.
#
# Seen: after loading, lm_head.weight is the one of the file and differs from the embedding.
# Exits with 1 when this has changed.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet transformers==5.24.0 torch==2.13.0 safetensors==0.8.0 numpy
cd "$dir"
HF_HUB_OFFLINE=1 "$dir/venv/bin/python" - 2>/dev/null <<'PY'
import json
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=256,
    tie_word_embeddings=False,
))
model.save_pretrained("saved")
config = json.load(open("saved/config.json"))
config["tie_word_embeddings"] = True
json.dump(config, open("saved/config.json", "w"))

again = LlamaForCausalLM.from_pretrained("saved")
stored = torch.equal(again.lm_head.weight, model.lm_head.weight)
tied = torch.equal(again.lm_head.weight, again.model.embed_tokens.weight)
print("tie_word_embeddings of the file:", config["tie_word_embeddings"])
print("the head is the stored one:", stored)
print("the head is the embedding:", tied)
assert stored and not tied
PY

#!/usr/bin/env bash
# transformers 5.24.0 (Apache-2.0): a model that was saved in shards and is then saved whole into the same directory
# leaves model.safetensors.index.json behind. The shards that it names are deleted, the index is not; from_pretrained
# never notices, for it looks for model.safetensors first. A loader that believes an index wherever there is one finds
# such a directory broken, though it is complete.
#
# Seen: the index names 5 shards, none of which exists, and from_pretrained gives back the very weights.
# Exits with 1 when this has changed.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet transformers==5.24.0 torch==2.13.0 safetensors==0.8.0 numpy
cd "$dir"
HF_HUB_OFFLINE=1 "$dir/venv/bin/python" - 2>/dev/null <<'PY'
import json, os
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=256,
))
model.save_pretrained("saved", max_shard_size="100KB")
model.save_pretrained("saved")
files = sorted(os.listdir("saved"))
named = sorted(set(json.load(open("saved/model.safetensors.index.json"))["weight_map"].values()))
again = LlamaForCausalLM.from_pretrained("saved")
equal = all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
print("files:", *files)
print("the index names:", *named)
print("named and there:", *(set(named) & set(files)))
print("from_pretrained gives the same weights:", equal)
assert len(named) == 5 and not set(named) & set(files) and "model.safetensors" in files and equal
PY

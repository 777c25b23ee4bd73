#!/usr/bin/env bash
# transformers 5.24.0 (Apache-2.0): a config.json with rope_parameters, the field of version 5, that is given the older
# rope_scaling as well (as guides for a longer context say) loses its rope_theta: rope_scaling takes the place of the
# whole rope_parameters, and the base falls back to the class's default of 10,000. No warning says so; the model
# answers with other frequencies in every layer.
#
# Seen: rope_theta 500000 of rope_parameters becomes 10000 when rope_scaling is there, and stays where it is null.
# Exits with 1 when this has changed.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet transformers==5.24.0
cd "$dir"
HF_HUB_OFFLINE=1 "$dir/venv/bin/python" - 2>/dev/null <<'PY'
import json
from transformers import AutoConfig

shape = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 64}
shape["rope_parameters"] = {"rope_type": "default", "rope_theta": 500000.0}
scaling = {"rope_type": "linear", "factor": 2.0}


def theta(**more):
    json.dump({**shape, **more}, open("config.json", "w"))
    found = AutoConfig.from_pretrained(".").rope_parameters
    print(more or "alone", "->", found)
    return found["rope_theta"]


assert theta() == theta(rope_scaling=None) == 500000.0
assert theta(rope_scaling=scaling) == 10000.0
assert theta(rope_scaling={**scaling, "rope_theta": 500000.0}) == 500000.0
PY

#!/usr/bin/env bash
# transformers 5.24.0 (Apache-2.0): Gemma 3's configuration has attn_logit_softcapping, as Gemma 2's has, its attention
# keeps the number, and the eager form of attention takes a softcap. It is never handed over: a Gemma 3 with a cap
# answers with the very bits of one without. Whoever carries Gemma 2's formula over computes another model.
#
# Seen: a cap of 0.01 changes the logits of Gemma 2 and not a bit of Gemma 3's.
# Exits with 1 when this has changed.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet transformers==5.24.0 torch==2.13.0 numpy
cd "$dir"
HF_HUB_OFFLINE=1 "$dir/venv/bin/python" - 2>/dev/null <<'PY'
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

sizes = dict(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    head_dim=16, attn_implementation="eager",
)


def logits(config_class, model_class, cap):
    torch.manual_seed(0)
    model = model_class(config_class(**sizes, attn_logit_softcapping=cap)).eval()
    with torch.no_grad():
        return model(torch.arange(5, 40)[None]).logits


same = {
    model_class.__name__: torch.equal(logits(config_class, model_class, None), logits(config_class, model_class, 0.01))
    for config_class, model_class in ((Gemma2Config, Gemma2ForCausalLM), (Gemma3TextConfig, Gemma3ForCausalLM))
}
print("the same with a cap of 0.01 as without:", same)
assert same == {"Gemma2ForCausalLM": False, "Gemma3ForCausalLM": True}
PY

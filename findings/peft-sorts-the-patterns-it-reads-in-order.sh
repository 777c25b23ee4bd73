#!/usr/bin/env bash
# peft 0.21.2 (Apache-2.0): where two keys of alpha_pattern match one module, the one that stands first in the dictionary
# counts. save_pretrained writes the configuration with its keys sorted, so another one may stand first when the adapter
# is loaded, and modules get another alpha than the one they were trained with. The ranks are the same, so all shapes
# fit, nothing is said, and the adapter answers otherwise than before it was saved. (Two keys of rank_pattern meet the
# same, but there the shapes no longer fit, which is an error.) A reader of adapter_config.json can only believe the file.
#
# Seen: {"q_proj": 8, "layers.1.self_attn.q_proj": 64} with r=8 gives both layers the scale 1; saved and loaded again,
# layer 1 has 8, and the logits differ by a twentieth of the largest. With the narrower key first nothing changes.
# Exits with 1 when this has changed.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile peft==0.21.2 transformers==5.24.0 torch==2.13.0 numpy
cd "$dir"
HF_HUB_OFFLINE=1 "$dir/venv/bin/python" - 2>/dev/null <<'PY'
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM


def base():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=64,
    ))


def look(model):
    """The scale of each layer's q_proj, and the logits of ten tokens."""
    scales = [layer.self_attn.q_proj.scaling["default"] for layer in model.get_base_model().model.layers]
    with torch.no_grad():
        return scales, model.eval()(torch.arange(5, 15)[None]).logits


def again(pattern):
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"], alpha_pattern=pattern, init_lora_weights=False)
    made = get_peft_model(base(), config)
    made.save_pretrained("adapter")
    (before, logits), (after, other) = look(made), look(PeftModel.from_pretrained(base(), "adapter"))
    change = ((logits - other).abs().max() / logits.abs().max()).item()
    print(f"{list(pattern)}: scales {before}, loaded again {after}; the logits change by {change:.2f} of the largest")
    return before, after, change


wide, narrow = {"q_proj": 8}, {"layers.1.self_attn.q_proj": 64}
before, after, change = again(wide | narrow)
assert before == [1, 1] and after == [1, 8] and change > 0.01
before, after, change = again(narrow | wide)
assert before == after == [1, 8] and change == 0
PY

#!/usr/bin/env bash
# transformers 5.24.0 (Apache-2.0): rms_norm_eps of config.json is the epsilon of all norms of a DeepSeek V3 but two. The
# norms of latent attention, q_a_layernorm and kv_a_layernorm, have 1e-6 whatever the file says, and classes that took the
# attention over do so, too: GLM-4.7-Flash, whose files say 1e-5, is run with both. A reader of the file who takes
# rms_norm_eps for all norms is off by more than rounding wherever latents are small.
#
# Seen: with rms_norm_eps 1e-3 the layers' norms and the last one have 1e-3, the two inner ones 1e-6.
# Exits with 1 when this has changed.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet transformers==5.24.0 torch==2.13.0 numpy
cd "$dir"
HF_HUB_OFFLINE=1 "$dir/venv/bin/python" - 2>/dev/null <<'PY'
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM

sizes = dict(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
    q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, rms_norm_eps=1e-3,
)
classes = ((DeepseekV3Config, DeepseekV3ForCausalLM), (Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM))
for config_class, model_class in classes:
    model = model_class(config_class(**sizes))
    found = {
        name.rsplit(".", 1)[-1]: module.variance_epsilon
        for name, module in model.named_modules()
        if hasattr(module, "variance_epsilon")
    }
    print(model_class.__name__, found)
    inner = {found.pop("q_a_layernorm"), found.pop("kv_a_layernorm")}
    assert inner == {1e-6} and set(found.values()) == {1e-3}
PY

#!/usr/bin/env bash
# compressed-tensors 0.20.1 with transformers 5.24.0 (both Apache-2.0): a model packed to four bits with a zero point
# for each group (the library's own preset W4A16_ASYM) is written and cannot be read back. The zero points are packed
# along the rows, eight to an int32, so weight_zero_point has an eighth of weight_scale's rows; the place that
# from_pretrained makes ready for them has all of them. The same model under W4A16, without zero points, comes back.
#
# Seen: the zero points in the file are int32 [32, 2] for scales [256, 2], and from_pretrained raises RuntimeError.
# Exits with 1 when this has changed.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet compressed-tensors==0.20.1 transformers==5.24.0 torch==2.13.0 accelerate==1.15.0 numpy
cd "$dir"
HF_HUB_OFFLINE=1 "$dir/venv/bin/python" - 2>/dev/null <<'PY'
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM


def write(preset):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4, vocab_size=64,
    )).to(torch.bfloat16)
    groups = {"group_0": preset_name_to_scheme(preset, ["Linear"])}
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"]))
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            args = module.quantization_scheme.weights
            values = module.weight.data.view(module.weight.shape[0], -1, args.group_size)
            scale, zero = calculate_qparams(values.amin(-1), values.amax(-1), args)
            module.weight_scale.data = scale.to(module.weight_scale.dtype)
            if hasattr(module, "weight_zero_point"):
                module.weight_zero_point.data = zero.to(module.weight_zero_point.dtype)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(preset)
    compressor.update_config(preset)


def shape(preset, name):
    with safe_open(f"{preset}/model.safetensors", "pt") as file:
        return file.get_slice(f"model.layers.0.self_attn.q_proj.{name}").get_shape()


def load(preset):
    try:
        AutoModelForCausalLM.from_pretrained(preset, dtype=torch.bfloat16)
    except RuntimeError as error:
        return f"RuntimeError: {error}"
    return "loads"


for preset in ("W4A16", "W4A16_ASYM"):
    write(preset)
scales, zeros = shape("W4A16_ASYM", "weight_scale"), shape("W4A16_ASYM", "weight_zero_point")
plain, with_zeros = load("W4A16"), load("W4A16_ASYM")
print("weight_scale", scales, "weight_zero_point", zeros)
print("W4A16:", plain)
print("W4A16_ASYM:", with_zeros)
assert scales == [256, 2] and zeros == [32, 2] and plain == "loads" and with_zeros.startswith("RuntimeError")
PY

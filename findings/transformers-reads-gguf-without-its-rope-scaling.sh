#!/usr/bin/env bash
# transformers 5.24.0 (Apache-2.0), from_pretrained(gguf_file=...): a GGUF file says in two ways that the rotary
# frequencies are not the plain ones. A Llama 3.1 or 3.2 has a tensor rope_freqs.weight, a divisor for each frequency; a
# Qwen2 stretched by YaRN has the keys rope.scaling.type, factor and original_context_length. Both are passed over without
# a word, the scaling is read for gpt-oss alone: the model is loaded with the base and rope_type "default", the last
# frequencies of a Llama 3.1 turn 8 times too fast, and the answer to a long prompt is another model's.
# So a GGUF that is loaded that way is no reference for one's own reader.
#
# Seen, with files of one layer that gguf 0.19.0 writes: the frequencies and the logits are the same, bit for bit, with
# and without rope_freqs.weight, and with and without YaRN by 4. Exits with 1 when this has changed.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile transformers==5.24.0 gguf==0.19.0 torch==2.13.0 accelerate==1.15.0 numpy
cd "$dir"
HF_HUB_OFFLINE=1 "$dir/venv/bin/python" - 2>/dev/null <<'PY'
import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM

MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def write(arch, divisors=None, yarn=None):
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter("model.gguf", arch)
    writer.add_context_length(32768)
    writer.add_block_count(1)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    writer.add_rope_dimension_count(32)
    writer.add_vocab_size(64)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"word{number}" for number in range(64)])
    shapes = {"token_embd.weight": (64, 64), "output.weight": (64, 64), "output_norm.weight": (64,)}
    shapes |= {f"blk.0.{name}.weight": (64, 64) for name in MATRICES}
    shapes |= {f"blk.0.{name}.weight": (64,) for name in ("attn_norm", "ffn_norm")}
    if arch == "qwen2":
        shapes |= {f"blk.0.{name}.bias": (64,) for name in ("attn_q", "attn_k", "attn_v")}
    for name, shape in shapes.items():
        writer.add_tensor(name, random.standard_normal(shape, np.float32) / 4)
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", np.array(divisors, np.float32))
    if yarn:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(yarn)
        writer.add_rope_scaling_orig_ctx_len(8192)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def look(arch, **more):
    write(arch, **more)
    reader = gguf.GGUFReader("model.gguf")
    told = [name for name in reader.fields if ".rope.scaling." in name]
    told += [tensor.name for tensor in reader.tensors if tensor.name.startswith("rope")]
    model = AutoModelForCausalLM.from_pretrained(".", gguf_file="model.gguf").eval()
    with torch.no_grad():
        logits = model(torch.arange(60)[None], position_ids=torch.arange(60)[None] * 100).logits
    slowest = model.model.rotary_emb.inv_freq[-1].item()
    print(f"{arch}: the file tells {told or 'nothing'}: {model.config.rope_parameters}, slowest frequency {slowest:.3g}")
    return told, model.model.rotary_emb.inv_freq, logits


for arch, more in (("llama", {"divisors": [1] * 8 + [8] * 8}), ("qwen2", {"yarn": 4.0})):
    _, plain, plain_logits = look(arch)
    told, scaled, scaled_logits = look(arch, **more)
    assert told and torch.equal(plain, scaled) and torch.equal(plain_logits, scaled_logits)
PY

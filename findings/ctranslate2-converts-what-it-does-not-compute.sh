#!/usr/bin/env bash
# ctranslate2 4.8.5 (MIT): its converter takes a model for what its class is by default. Gemma 2 is converted and computed
# without the caps of its attention and of its logits, and with heads scaled by their size where query_pre_attn_scalar is
# another number, as in the model of 27 billion. A Llama whose heads are not hidden_size divided by their number
# (head_dim in config.json, as pruned ones have) has its heads cut at other places, and whose activation is not SiLU
# gets it all the same. Each loads and answers; no shape is amiss, for the projections are stored as one matrix. Qwen 3 and
# Mistral with a head_dim of their own come out right. Nothing is said.
#
# Seen, small random models, float32: how far the logits are from those of transformers 5.24.0, by the largest.
# Exits with 1 when this has changed.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile ctranslate2==4.8.5 transformers==5.24.0 torch==2.13.0 numpy
cd "$dir"
HF_HUB_OFFLINE=1 "$dir/venv/bin/python" - 2>/dev/null <<'PY'
import ctranslate2
import numpy
import torch
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

words = [*(f"w{number}" for number in range(61)), "<unk>", "<s>", "</s>"]
ids = torch.randint(0, 61, (48,), generator=torch.Generator().manual_seed(1))
size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
size |= {"bos_token_id": 62, "eos_token_id": 63, "pad_token_id": 63}


def away(path, kind, **given):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **size, **given))
    for weight in model.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(path)
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(path)
    with torch.no_grad():
        right = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()(ids[None]).logits[0].numpy()
    ctranslate2.converters.TransformersConverter(path).convert(f"{path}/converted")
    converted = ctranslate2.Generator(f"{path}/converted", device="cpu", compute_type="float32")
    seen = numpy.array(converted.forward_batch([[words[number] for number in ids]]))[0]
    distance = float(abs(seen - right).max() / abs(right).max())
    print(f"{path}: {distance:.1e}")
    return distance


gemma = {"head_dim": 8, "num_key_value_heads": 2}
bare = {"attn_logit_softcapping": None, "final_logit_softcapping": None, "query_pre_attn_scalar": 8}
assert away("gemma2-bare", "gemma2", **gemma, **bare) < 1e-4
assert away("gemma2-attention", "gemma2", **gemma, **bare | {"attn_logit_softcapping": 1.0}) > 0.01
assert away("gemma2-logits", "gemma2", **gemma, **bare | {"final_logit_softcapping": 1.0}) > 0.01
assert away("gemma2-scalar", "gemma2", **gemma, **bare | {"query_pre_attn_scalar": 12}) > 0.01
assert away("llama", "llama") < 1e-4
assert away("llama-heads", "llama", head_dim=16) > 0.01
assert away("llama-gelu", "llama", hidden_act="gelu") > 0.01
assert away("qwen3-heads", "qwen3", head_dim=16, num_key_value_heads=2) < 1e-4
assert away("mistral-heads", "mistral", head_dim=16, num_key_value_heads=2, sliding_window=None) < 1e-4
PY

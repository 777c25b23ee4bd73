#!/usr/bin/env bash
# ctranslate2 4.8.5 (MIT): a Llama whose rotary frequencies are scaled as those of Llama 3.1 and 3.2 are (rope_type "llama3")
# is converted without the factor of that scaling. The model that is written has the type and both frequency factors; the
# factor is written for "linear" alone, and what is missing counts as 1. So every frequency is the plain one, where the
# model was trained with the low ones at an eighth or a thirty-second: a little off from the first tokens on, and another
# model's answer where the prompt is long. Types that it cannot compute ("yarn", "dynamic") are refused, so
# one believes what is not refused. Nothing is said.
#
# Seen, a small random model, 400 tokens, float32: beside transformers 5.24.0 the logits are off by more than a quarter of the
# largest, and beside the same weights with rope_type "default" by rounding; "linear" comes out right.
# Exits with 1 when this has changed.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile ctranslate2==4.8.5 transformers==5.24.0 torch==2.13.0 numpy
cd "$dir"
HF_HUB_OFFLINE=1 "$dir/venv/bin/python" - 2>/dev/null <<'PY'
from pathlib import Path

import ctranslate2
import numpy
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

words = [*(f"w{number}" for number in range(61)), "<unk>", "<s>", "</s>"]
ids = torch.randint(0, 61, (400,), generator=torch.Generator().manual_seed(1))
plain = {"rope_type": "default", "rope_theta": 500000.0}
llama3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
linear = {"rope_type": "linear", "rope_theta": 500000.0, "factor": 8.0}


def write(path, rope):
    """Save one and the same random model, with these frequencies."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        hidden_size=256, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=64,
        max_position_embeddings=131072, rope_parameters=rope, bos_token_id=62, eos_token_id=63,
    ))
    for weight in model.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(path)
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(path)


def by_transformers(path):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(ids[None]).logits[0].numpy()


def by_ctranslate2(path):
    ctranslate2.converters.TransformersConverter(path).convert(f"{path}/converted")
    model = ctranslate2.Generator(f"{path}/converted", device="cpu", compute_type="float32")
    return numpy.array(model.forward_batch([[words[number] for number in ids]]))[0]


def away(seen, right):
    return abs(seen - right).max() / abs(right).max()


for path, rope in (("plain", plain), ("llama3", llama3), ("linear", linear)):
    write(path, rope)
seen = {path: by_ctranslate2(path) for path in ("plain", "llama3", "linear")}
right = {path: by_transformers(path) for path in seen}
written = {path: Path(f"{path}/converted/model.bin").read_bytes() for path in seen}
for path in seen:
    print(f"{path}: {away(seen[path], right[path]):.1e} from transformers, {away(seen[path], right['plain']):.1e} from plain")
print("rotary_scaling_factor:", {path: b"rotary_scaling_factor" in written[path] for path in seen})
assert away(seen["plain"], right["plain"]) < 1e-4 and away(seen["linear"], right["linear"]) < 1e-4
assert away(seen["llama3"], right["llama3"]) > 0.1 and away(seen["llama3"], right["plain"]) < 1e-4
assert b"rotary_low_freq_factor" in written["llama3"] and b"rotary_scaling_factor" not in written["llama3"]
PY

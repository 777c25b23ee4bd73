#!/usr/bin/env bash
# transformers 5.24.0 (Apache-2.0): with rope_type "longrope" (Phi-3 and 4 of 128k) and "dynamic" (InternLM 3) one set of
# rotary frequencies serves the whole call, chosen by the largest position in the batch. A short prompt that is computed
# beside one beyond original_max_position_embeddings is turned by the long factors, too, and has other logits than alone.
# "dynamic" remembers besides: the base stays that of the longest call so far until one comes that is shorter than the
# original length, so a prompt of that length or more has other logits after a longer one than before it.
# Whoever takes batched logits for the reference of single requests measures that, and not rounding.
#
# Seen, prompts of 24 and 60 tokens, an original length of 32 (longrope) and 16 (dynamic): beside the longer one the logits
# of the shorter one differ by more than half of the largest; for "dynamic" they do so alone, too, once the longer one has
# been computed, until a call of 8 tokens has come. With rope_type "default" it is rounding alone.
# Exits with 1 when this has changed.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile transformers==5.24.0 torch==2.13.0 numpy
cd "$dir"
HF_HUB_OFFLINE=1 "$dir/venv/bin/python" - 2>/dev/null <<'PY'
import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    initializer_range=0.2, pad_token_id=0,
)
SHORT, LONG = torch.randint(3, 64, (2, 60), generator=torch.Generator().manual_seed(0)).split(1)
SHORT = SHORT[:, :24]


def logits(model, *prompts):
    """The first prompt's logits, computed beside the others, all of them padded on the right."""
    longest = max(prompt.shape[1] for prompt in prompts)
    ids, mask = torch.zeros(2, len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, : prompt.shape[1]] = prompt
        mask[row, : prompt.shape[1]] = 1
    with torch.no_grad():
        return model(ids, attention_mask=mask).logits[0, : prompts[0].shape[1]]


def change(found, alone):
    return ((found - alone).abs().max() / alone.abs().max()).item()


def look(name, **more):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SIZES, **more)).eval()
    alone = logits(model, SHORT)
    beside = change(logits(model, SHORT, LONG), alone)
    after = change(logits(model, SHORT), alone)
    logits(model, SHORT[:, :8])
    later = change(logits(model, SHORT), alone)
    kind = more["rope_parameters"]["rope_type"]
    print(f"{kind:<8} beside a longer one {beside:.6f}, alone after it {after:.6f}, after a call of 8 tokens {later:.6f}")
    return beside, after, later


phi = dict(max_position_embeddings=128, original_max_position_embeddings=32)
factors = dict(short_factor=[1.0] * 4, long_factor=[1.0, 2.0, 4.0, 4.0], original_max_position_embeddings=32)
beside, after, later = look("phi3", **phi, rope_parameters=dict(
    rope_type="longrope", rope_theta=10000.0, partial_rotary_factor=1.0, **factors,
))
assert beside > 0.1 and after < 1e-4 and later < 1e-4
internlm = dict(head_dim=8, max_position_embeddings=16)
beside, after, later = look("internlm3", **internlm, rope_parameters=dict(
    rope_type="dynamic", rope_theta=10000.0, factor=6.0,
))
assert beside > 0.1 and after > 0.1 and later < 1e-4
plain = dict(rope_type="default", rope_theta=10000.0)
assert max(look("internlm3", **internlm, rope_parameters=plain)) < 1e-4
PY

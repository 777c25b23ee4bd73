"""The text part of Qwen2-VL and Qwen2.5-VL: Qwen 2's layers, with a rope of three axes that are one for text."""

from __future__ import annotations

from engine.models.families import qwen2
from engine.models.fields import Fields
from engine.models.spec import ModelSpec

# What an absent field means: Qwen2VLTextConfig and Qwen2_5_VLTextConfig of transformers.
DEFAULTS = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-05,
    "eos_token_id": 151645,
    "tie_word_embeddings": False,
    "rope_theta": 1000000.0,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 80,
}
# Dimensions turn by a token's place in time, height or width; a text's three places are the same.
MROPE = {"mrope": "default"}


def read_spec(fields: Fields) -> ModelSpec:
    return qwen2.read_spec(fields, MROPE)

"""Qwen 3 (dense): a norm on every head of q and k, and a head_dim of its own."""

from __future__ import annotations

from dataclasses import replace

from engine.models.families.common import read_activation, read_shape
from engine.models.families.qwen2 import qwen_windows
from engine.models.families.rope import read_rope
from engine.models.fields import Fields
from engine.models.spec import Dense, ModelSpec

# What an absent field means: Qwen3Config of transformers.
DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def read_spec(fields: Fields) -> ModelSpec:
    shape = read_shape(fields)
    bias = fields.flag("attention_bias")
    attention = shape.attention(read_rope(fields, shape), qkv_bias=bias, output_bias=bias, **shape.qk_norms())
    mlp = Dense(shape.intermediate_size, read_activation(fields, "hidden_act"))
    windows = qwen_windows(fields, shape)
    return shape.model(shape.layer(replace(attention, window=window), mlp) for window in windows)

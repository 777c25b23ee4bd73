"""Qwen 3 (dense): a norm on every head of q and k, and a head_dim of its own."""

from __future__ import annotations

from engine.models.config import ModelConfig, read_activation, read_rope, read_shape
from engine.models.fields import Fields
from engine.models.qwen2 import qwen_windows

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


def read_config(fields: Fields) -> ModelConfig:
    shape = read_shape(fields)
    attention_bias = fields.flag("attention_bias")
    return ModelConfig(
        **shape.common,
        rope=read_rope(fields, shape),
        attention_scale=shape.head_dim**-0.5,
        windows=qwen_windows(fields, shape),
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        qk_norm="head",
        activation=read_activation(fields, "hidden_act"),
    )

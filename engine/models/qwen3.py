"""Qwen 3 (dense): a norm on every head of q and k, and a head_dim of its own."""

from __future__ import annotations

from engine.models.config import Fields, ModelConfig, read_activation, read_rope, read_shape
from engine.models.qwen2 import qwen_windows


def read_config(fields: Fields) -> ModelConfig:
    shape = read_shape(fields, head_dim=128)
    attention_bias = fields.flag("attention_bias", False)
    return ModelConfig(
        **shape.common,
        rope=read_rope(fields, shape),
        attention_scale=shape.head_dim**-0.5,
        windows=qwen_windows(fields, shape),
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        qk_norm="head",
        activation=read_activation(fields, "hidden_act", "silu"),
    )

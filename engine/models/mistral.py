"""Mistral: Llama's layers, with a sliding window over all of them in some releases."""

from __future__ import annotations

from engine.models.config import Fields, ModelConfig, read_activation, read_rope, read_shape, read_windows


def read_config(fields: Fields) -> ModelConfig:
    shape = read_shape(fields)
    layer_types = fields.layer_types(shape.num_layers) or ("sliding_attention",) * shape.num_layers
    return ModelConfig(
        **shape.common,
        rope=read_rope(fields, shape),
        attention_scale=shape.head_dim**-0.5,
        windows=read_windows(fields, shape, layer_types),
        activation=read_activation(fields, "hidden_act", "silu"),
    )

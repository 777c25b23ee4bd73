"""Llama 2 and 3, and the many checkpoints that declare themselves Llama: `LlamaForCausalLM`."""

from __future__ import annotations

from engine.models.config import Fields, ModelConfig, read_activation, read_rope, read_shape


def read_config(fields: Fields) -> ModelConfig:
    """attention_bias covers q, k, v and o; no windows."""
    shape = read_shape(fields)
    attention_bias = fields.flag("attention_bias", False)
    return ModelConfig(
        **shape.common,
        rope=read_rope(fields, shape),
        attention_scale=shape.head_dim**-0.5,
        windows=(None,) * shape.num_layers,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=fields.flag("mlp_bias", False),
        activation=read_activation(fields, "hidden_act", "silu"),
    )

"""GLM-4 (the 0414 releases): norms before and after each block, and interleaved rope on half of each head."""

from __future__ import annotations

from engine.models.config import Fields, ModelConfig, WeightNames, read_activation, read_rope, read_shape

NAMES = WeightNames(
    attention_out_norm="post_self_attn_layernorm",
    mlp_norm="post_attention_layernorm",
    mlp_out_norm="post_mlp_layernorm",
    gate_up=("mlp.gate_up_proj",),
)


def read_config(fields: Fields) -> ModelConfig:
    """attention_bias covers q, k and v but not o."""
    shape = read_shape(fields, head_dim=128)
    return ModelConfig(
        **shape.common,
        rope=read_rope(fields, shape, partial_rotary_factor=0.5, interleaved=True),
        attention_scale=shape.head_dim**-0.5,
        windows=(None,) * shape.num_layers,
        qkv_bias=fields.flag("attention_bias", True),
        activation=read_activation(fields, "hidden_act", "silu"),
        names=NAMES,
    )

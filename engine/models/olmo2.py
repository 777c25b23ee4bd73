"""OLMo 2: norms only after attention and MLP, and norms on q and k over all heads at once."""

from __future__ import annotations

from engine.models.config import Fields, ModelConfig, WeightNames, read_activation, read_rope, read_shape

NAMES = WeightNames(
    input_norm=None,
    attention_out_norm="post_attention_layernorm",
    mlp_norm=None,
    mlp_out_norm="post_feedforward_layernorm",
)


def read_config(fields: Fields) -> ModelConfig:
    shape = read_shape(fields)
    attention_bias = fields.flag("attention_bias", False)
    return ModelConfig(
        **shape.common,
        rope=read_rope(fields, shape),
        attention_scale=shape.head_dim**-0.5,
        windows=(None,) * shape.num_layers,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        qk_norm="full",
        activation=read_activation(fields, "hidden_act", "silu"),
        names=NAMES,
    )

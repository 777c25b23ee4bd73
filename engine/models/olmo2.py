"""OLMo 2: norms only after attention and MLP, and norms on q and k over all heads at once."""

from __future__ import annotations

from engine.models.config import ModelConfig, WeightNames, read_activation, read_rope, read_shape
from engine.models.fields import Fields

NAMES = WeightNames(
    input_norm=None,
    attention_out_norm="post_attention_layernorm",
    mlp_norm=None,
    mlp_out_norm="post_feedforward_layernorm",
)


# What an absent field means: Olmo2Config of transformers.
DEFAULTS = {
    "vocab_size": 50304,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-05,
    "eos_token_id": 50279,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "attention_bias": False,
}


def read_config(fields: Fields) -> ModelConfig:
    shape = read_shape(fields)
    attention_bias = fields.flag("attention_bias")
    return ModelConfig(
        **shape.common,
        rope=read_rope(fields, shape),
        attention_scale=shape.head_dim**-0.5,
        windows=(None,) * shape.num_layers,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        qk_norm="full",
        activation=read_activation(fields, "hidden_act"),
        names=NAMES,
    )

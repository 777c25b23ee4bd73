"""GLM-4 (the 0414 releases): norms before and after each block, and interleaved rope on half of each head."""

from __future__ import annotations

from engine.models.config import ModelConfig, WeightNames, read_activation, read_rope, read_shape
from engine.models.fields import Fields

NAMES = WeightNames(
    attention_out_norm="post_self_attn_layernorm",
    mlp_norm="post_attention_layernorm",
    mlp_out_norm="post_mlp_layernorm",
    gate_up=("mlp.gate_up_proj",),
)


# What an absent field means: Glm4Config of transformers.
DEFAULTS = {
    "vocab_size": 151552,
    "hidden_size": 4096,
    "intermediate_size": 13696,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1.5625e-07,
    "eos_token_id": [151329, 151336, 151338],
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "attention_bias": True,
}


def read_config(fields: Fields) -> ModelConfig:
    """attention_bias covers q, k and v but not o."""
    shape = read_shape(fields)
    return ModelConfig(
        **shape.common,
        rope=read_rope(fields, shape, interleaved=True),
        attention_scale=shape.head_dim**-0.5,
        windows=(None,) * shape.num_layers,
        qkv_bias=fields.flag("attention_bias"),
        activation=read_activation(fields, "hidden_act"),
        names=NAMES,
    )

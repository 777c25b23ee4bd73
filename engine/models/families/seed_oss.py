"""Seed-OSS: Llama's layers with a bias on q, k and v, and one of its own on the way out."""

from __future__ import annotations

from engine.models.families.common import read_activation, read_shape
from engine.models.families.rope import read_rope
from engine.models.fields import Fields
from engine.models.spec import Dense, ModelSpec

# What an absent field means: SeedOssConfig of transformers.
DEFAULTS = {
    "vocab_size": 155136,
    "hidden_size": 4096,
    "intermediate_size": 27648,
    "num_hidden_layers": 64,
    "num_attention_heads": 80,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 524288,
    "rms_norm_eps": 1e-06,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "attention_bias": True,
    "attention_out_bias": False,
    "mlp_bias": False,
}


def read_spec(fields: Fields) -> ModelSpec:
    shape = read_shape(fields)
    attention = shape.attention(
        read_rope(fields, shape),
        qkv_bias=fields.flag("attention_bias"),
        output_bias=fields.flag("attention_out_bias"),
    )
    mlp = Dense(shape.intermediate_size, read_activation(fields, "hidden_act"), bias=fields.flag("mlp_bias"))
    return shape.model([shape.layer(attention, mlp)] * shape.num_layers)

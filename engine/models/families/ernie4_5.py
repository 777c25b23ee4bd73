"""ERNIE 4.5 (dense): Llama's layers with an interleaved rope."""

from __future__ import annotations

from engine.models.families.common import read_activation, read_shape
from engine.models.families.rope import read_rope
from engine.models.fields import Fields
from engine.models.spec import Dense, ModelSpec

# What an absent field means: Ernie4_5Config of transformers.
DEFAULTS = {
    "vocab_size": 103424,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 18,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
    "rope_theta": 500000.0,
    "use_bias": False,
}


def read_spec(fields: Fields) -> ModelSpec:
    """use_bias covers all projections."""
    shape = read_shape(fields)
    bias = fields.flag("use_bias")
    attention = shape.attention(read_rope(fields, shape, interleaved=True), qkv_bias=bias, output_bias=bias)
    mlp = Dense(shape.intermediate_size, read_activation(fields, "hidden_act"), bias=bias)
    return shape.model([shape.layer(attention, mlp)] * shape.num_layers)

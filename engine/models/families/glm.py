"""GLM-4 (the 9B releases of 2024): interleaved rope on half of each head, fused gate and up."""

from __future__ import annotations

from engine.models.families.common import read_activation, read_shape
from engine.models.families.rope import read_rope
from engine.models.fields import Fields
from engine.models.spec import Dense, ModelSpec

# What an absent field means: GlmConfig of transformers.
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


def read_spec(fields: Fields) -> ModelSpec:
    """attention_bias covers q, k and v but not o."""
    shape = read_shape(fields)
    attention = shape.attention(read_rope(fields, shape, interleaved=True), qkv_bias=fields.flag("attention_bias"))
    mlp = Dense(shape.intermediate_size, read_activation(fields, "hidden_act"), gate_up=("mlp.gate_up_proj",))
    return shape.model([shape.layer(attention, mlp)] * shape.num_layers)

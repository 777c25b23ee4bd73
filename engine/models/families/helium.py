"""Helium: Llama with interleaved rope and an output projection that never has a bias."""

from __future__ import annotations

from engine.models.families.common import read_activation, read_shape
from engine.models.families.rope import read_rope
from engine.models.fields import Fields
from engine.models.spec import Dense, ModelSpec

# What an absent field means: HeliumConfig of transformers.
DEFAULTS = {
    "vocab_size": 48000,
    "hidden_size": 2560,
    "intermediate_size": 7040,
    "num_hidden_layers": 24,
    "num_attention_heads": 20,
    "num_key_value_heads": 20,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-08,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "rope_theta": 100000.0,
    "attention_bias": False,
    "mlp_bias": False,
}


def read_spec(fields: Fields) -> ModelSpec:
    shape = read_shape(fields)
    rope = read_rope(fields, shape, interleaved=True)
    attention = shape.attention(rope, qkv_bias=fields.flag("attention_bias"))
    mlp = Dense(shape.intermediate_size, read_activation(fields, "hidden_act"), bias=fields.flag("mlp_bias"))
    return shape.model([shape.layer(attention, mlp)] * shape.num_layers)

"""The text part of Qwen3-VL: Qwen 3's layers without windows, with a rope of three axes that are one for text."""

from __future__ import annotations

from engine.models.families.common import read_activation, read_shape
from engine.models.families.qwen2_vl import MROPE
from engine.models.families.rope import read_rope
from engine.models.fields import Fields
from engine.models.spec import Dense, ModelSpec

# What an absent field means: Qwen3VLTextConfig of transformers.
DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 128000,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "rope_theta": 500000.0,
    "attention_bias": False,
}


def read_spec(fields: Fields) -> ModelSpec:
    shape = read_shape(fields)
    bias = fields.flag("attention_bias")
    rope = read_rope(fields, shape, renamed=MROPE)
    attention = shape.attention(rope, qkv_bias=bias, output_bias=bias, **shape.qk_norms())
    mlp = Dense(shape.intermediate_size, read_activation(fields, "hidden_act"))
    return shape.model([shape.layer(attention, mlp)] * shape.num_layers)

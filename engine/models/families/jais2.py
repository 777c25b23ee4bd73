"""Jais 2: Llama's layers with LayerNorm, biases and an MLP without a gate."""

from __future__ import annotations

from engine.models.families.common import read_plain_activation, read_shape
from engine.models.families.rope import read_rope
from engine.models.fields import Fields
from engine.models.spec import ModelSpec, Ungated

# What an absent field means: Jais2Config of transformers.
DEFAULTS = {
    "vocab_size": 150272,
    "hidden_size": 3328,
    "intermediate_size": 26624,
    "num_hidden_layers": 32,
    "num_attention_heads": 26,
    "hidden_act": "relu2",
    "max_position_embeddings": 8192,
    "layer_norm_eps": 1e-05,
    "eos_token_id": 150024,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "attention_bias": True,
    "mlp_bias": True,
}


def read_spec(fields: Fields) -> ModelSpec:
    shape = read_shape(fields, eps="layer_norm_eps", centered=True, bias=True)
    bias = fields.flag("attention_bias")
    attention = shape.attention(read_rope(fields, shape), qkv_bias=bias, output_bias=bias)
    mlp = Ungated(shape.intermediate_size, read_plain_activation(fields, "hidden_act"), bias=fields.flag("mlp_bias"))
    return shape.model([shape.layer(attention, mlp)] * shape.num_layers)

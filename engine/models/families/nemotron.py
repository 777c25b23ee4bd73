"""Nemotron 3 and 4, Minitron: LayerNorm whose weight stands for 1 + weight, half a rope, no gate."""

from __future__ import annotations

from engine.models.families.common import read_plain_activation, read_shape
from engine.models.families.rope import read_rope
from engine.models.fields import Fields
from engine.models.spec import ModelSpec, Ungated

# What an absent field means: NemotronConfig of transformers.
DEFAULTS = {
    "vocab_size": 256000,
    "hidden_size": 6144,
    "intermediate_size": 24576,
    "num_hidden_layers": 32,
    "num_attention_heads": 48,
    "hidden_act": "relu2",
    "max_position_embeddings": 4096,
    "norm_eps": 1e-05,
    "eos_token_id": 3,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "attention_bias": False,
    "mlp_bias": False,
}


def read_spec(fields: Fields) -> ModelSpec:
    shape = read_shape(fields, eps="norm_eps", offset=1.0, centered=True, bias=True)
    bias = fields.flag("attention_bias")
    attention = shape.attention(read_rope(fields, shape), qkv_bias=bias, output_bias=bias)
    mlp = Ungated(shape.intermediate_size, read_plain_activation(fields, "hidden_act"), bias=fields.flag("mlp_bias"))
    return shape.model([shape.layer(attention, mlp)] * shape.num_layers)

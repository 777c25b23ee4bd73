"""OLMo 1: Llama's layers with LayerNorm that has no weights."""

from __future__ import annotations

from engine.models.families import olmo2
from engine.models.families.common import read_activation, read_shape
from engine.models.families.rope import read_rope
from engine.models.fields import Fields
from engine.models.spec import Dense, ModelSpec

# What an absent field means: OlmoConfig of transformers.
DEFAULTS = {name: value for name, value in olmo2.DEFAULTS.items() if name != "rms_norm_eps"}
EPS = 1e-5


def read_spec(fields: Fields) -> ModelSpec:
    """clip_qkv: q, k and v are cut off there."""
    shape = read_shape(fields.with_values({"eps": EPS}), eps="eps", centered=True, weightless=True)
    bias = fields.flag("attention_bias")
    clip = fields.optional_number("clip_qkv", above=0.0)
    attention = shape.attention(read_rope(fields, shape), qkv_bias=bias, output_bias=bias, clip=clip)
    mlp = Dense(shape.intermediate_size, read_activation(fields, "hidden_act"))
    return shape.model([shape.layer(attention, mlp)] * shape.num_layers)

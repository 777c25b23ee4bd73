"""GLM-4 (the 0414 releases): norms before and after each block, and interleaved rope on half of each head."""

from __future__ import annotations

from collections.abc import Mapping

from engine.models.families import glm
from engine.models.families.common import read_activation, read_shape
from engine.models.families.rope import read_rope
from engine.models.fields import Fields
from engine.models.spec import Dense, ModelSpec

NORMS = ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")

# What an absent field means: Glm4Config of transformers.
DEFAULTS = glm.DEFAULTS


def read_spec(fields: Fields, renamed: Mapping[str, str] | None = None) -> ModelSpec:
    """attention_bias covers q, k and v but not o. renamed: see read_rope."""
    shape = read_shape(fields)
    rope = read_rope(fields, shape, interleaved=True, renamed=renamed)
    attention = shape.attention(rope, qkv_bias=fields.flag("attention_bias"))
    mlp = Dense(shape.intermediate_size, read_activation(fields, "hidden_act"), gate_up=("mlp.gate_up_proj",))
    return shape.model([shape.layer(attention, mlp, NORMS)] * shape.num_layers)

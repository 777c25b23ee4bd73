"""Qwen 3.5, 3.6 and 3.8 (dense), the text part: Qwen3-Next's layers with plain projections and an MLP."""

from __future__ import annotations

from engine.models.families import qwen3_next
from engine.models.families.common import read_activation, read_shape
from engine.models.families.qwen2_vl import MROPE
from engine.models.fields import Fields
from engine.models.spec import Dense, ModelSpec

# What an absent field means: Qwen3_5TextConfig of transformers.
DEFAULTS = {
    **qwen3_next.COMMON,
    "vocab_size": 248320,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 32,
    "num_key_value_heads": 4,
}
PROJECTIONS = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")


def read_spec(fields: Fields) -> ModelSpec:
    shape = read_shape(fields, offset=1.0)
    mlp = Dense(shape.intermediate_size, read_activation(fields, "hidden_act"))
    layers = qwen3_next.hybrid_layers(fields, shape, [mlp] * shape.num_layers, PROJECTIONS, MROPE)
    return shape.model(layers, outside=qwen3_next.DRAFTING)

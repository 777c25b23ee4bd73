"""Granite 3 with experts and an MLP that all tokens share."""

from __future__ import annotations

from collections.abc import Sequence

from engine.models.families import granite_moe
from engine.models.families.common import Shape, read_activation, read_shape
from engine.models.families.granite import granite_scales
from engine.models.families.rope import read_rope
from engine.models.fields import Fields
from engine.models.mixers import GroupedQueryAttention
from engine.models.spec import Dense, ModelSpec

# What an absent field means: GraniteMoeSharedConfig of transformers.
DEFAULTS = {**granite_moe.DEFAULTS, "shared_intermediate_size": 0}


def read_spec(fields: Fields) -> ModelSpec:
    shape = read_shape(fields)
    bias, scale = fields.flag("attention_bias"), fields.number("attention_multiplier", above=0.0)
    attention = shape.attention(read_rope(fields, shape), scale=scale, qkv_bias=bias, output_bias=bias)
    return shared_model(fields, shape, [attention] * shape.num_layers)


def shared_model(fields: Fields, shape: Shape, mixers: Sequence[GroupedQueryAttention]) -> ModelSpec:
    """A size of 0 is no such MLP."""
    size = fields.integer("shared_intermediate_size", minimum=0)
    shared = None
    if size:
        names = ("shared_mlp.input_linear",)
        shared = Dense(size, read_activation(fields, "hidden_act"), gate_up=names, down="shared_mlp.output_linear")
    experts = granite_moe.granite_experts(fields, shape, shared=shared)
    factor = fields.number("residual_multiplier", above=0.0)
    layers = (shape.layer(each, experts, residual_scale=factor) for each in mixers)
    return shape.model(layers, **granite_scales(fields))

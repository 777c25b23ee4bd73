"""Granite 3 with experts: Granite's factors, and all experts of a layer in one tensor."""

from __future__ import annotations

from typing import Any

from engine.models.families.common import Shape, read_activation, read_experts, read_shape
from engine.models.families.granite import COMMON, granite_scales
from engine.models.families.rope import read_rope
from engine.models.fields import Fields
from engine.models.spec import Experts, ModelSpec, Router

# What an absent field means: GraniteMoeConfig of transformers.
DEFAULTS = {**COMMON, "num_local_experts": 8, "num_experts_per_tok": 2}


def read_spec(fields: Fields) -> ModelSpec:
    shape = read_shape(fields)
    bias = fields.flag("attention_bias")
    scale = fields.number("attention_multiplier", above=0.0)
    attention = shape.attention(read_rope(fields, shape), scale=scale, qkv_bias=bias, output_bias=bias)
    experts = granite_experts(fields, shape)
    layer = shape.layer(attention, experts, residual_scale=fields.number("residual_multiplier", above=0.0))
    return shape.model([layer] * shape.num_layers, **granite_scales(fields))


def granite_experts(fields: Fields, shape: Shape, **given: Any) -> Experts:
    """The best are chosen before the softmax, which comes to the same as shares that add up to 1."""
    num_experts, num_experts_per_token = read_experts(fields, "num_local_experts", "num_experts")
    return Experts(
        num_experts,
        num_experts_per_token,
        shape.intermediate_size,
        read_activation(fields, "hidden_act"),
        Router(normalize=True, name="block_sparse_moe.router.layer"),
        gate_up=("block_sparse_moe.input_linear.{}",),
        down="block_sparse_moe.output_linear.{}",
        stacked="rows",
        **given,
    )

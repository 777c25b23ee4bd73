"""Granite 4 without Mamba layers (350M, 1B, micro): Granite, with its MLP under another name."""

from __future__ import annotations

from engine.models.families import granite_moe
from engine.models.families.common import read_activation, read_shape
from engine.models.families.granite import granite_scales
from engine.models.families.rope import read_rope
from engine.models.fields import Fields
from engine.models.spec import Dense, ModelSpec

# What an absent field means: GraniteMoeHybridConfig of transformers.
DEFAULTS = {**granite_moe.DEFAULTS, "shared_intermediate_size": 1024}


def read_spec(fields: Fields) -> ModelSpec:
    """No rope unless `position_embedding_type` says so. Experts stand beside the MLP where there are any."""
    shape = read_shape(fields)
    kinds = fields.words("layer_types") or fields.words("layers_block_type")
    if len(kinds) != shape.num_layers or not set(kinds) <= {"attention", "full_attention"}:
        fields.fail("layer_types", "must hold attention for every layer: Mamba layers are not supported")
    bias = fields.flag("attention_bias")
    rope = read_rope(fields, shape) if fields.raw("position_embedding_type") == "rope" else None
    scale = fields.number("attention_multiplier", above=0.0)
    attention = shape.attention(rope, scale=scale, qkv_bias=bias, output_bias=bias)
    shared = Dense(
        fields.integer("shared_intermediate_size"),
        read_activation(fields, "hidden_act"),
        gate_up=("shared_mlp.input_linear",),
        down="shared_mlp.output_linear",
    )
    has_experts = fields.integer("num_local_experts", minimum=0) > 0
    feed_forward = granite_moe.granite_experts(fields, shape, shared=shared) if has_experts else shared
    layer = shape.layer(attention, feed_forward, residual_scale=fields.number("residual_multiplier", above=0.0))
    return shape.model([layer] * shape.num_layers, **granite_scales(fields))

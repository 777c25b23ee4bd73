"""Granite 4: Granite with Mamba 2 in most layers, or in none, and its MLP under another name."""

from __future__ import annotations

from engine.models.families import granite_moe
from engine.models.families.common import read_activation, read_shape
from engine.models.families.granite import granite_scales
from engine.models.families.mamba import read_mamba
from engine.models.families.rope import read_rope
from engine.models.fields import Fields, show
from engine.models.mixers import Mixer, NormSpec
from engine.models.spec import Dense, ModelSpec

# What an absent field means: GraniteMoeHybridConfig of transformers.
DEFAULTS = {
    **granite_moe.DEFAULTS,
    "shared_intermediate_size": 1024,
    "mamba_n_heads": 128,
    "mamba_n_groups": 1,
    "mamba_d_state": 256,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
}
# What layers are called, in older files and in newer ones.
KINDS = {"mamba": "mamba", "linear_attention": "mamba", "attention": "attention", "full_attention": "attention"}


def read_spec(fields: Fields) -> ModelSpec:
    """No rope unless `position_embedding_type` says so. Experts stand beside the MLP where there are any."""
    shape = read_shape(fields)
    kinds = fields.words("layer_types") or fields.words("layers_block_type")
    kinds = kinds or ("mamba",) * shape.num_layers
    if len(kinds) != shape.num_layers:
        fields.fail("layer_types", f"must be a list of num_hidden_layers = {shape.num_layers} entries")
    for kind in kinds:
        if kind not in KINDS:
            fields.fail("layer_types", f"must hold mamba or attention, not {show(kind)}")
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
    mixers: dict[str, Mixer] = {"attention": attention}
    if any(KINDS[kind] == "mamba" for kind in kinds):
        inner = fields.integer("mamba_expand", maximum=64) * shape.hidden_size
        mixers["mamba"] = read_mamba(fields, inner, NormSpec("norm", shape.norms["eps"]), "hidden_act")
    factor = fields.number("residual_multiplier", above=0.0)
    layers = (shape.layer(mixers[KINDS[kind]], feed_forward, residual_scale=factor) for kind in kinds)
    return shape.model(layers, **granite_scales(fields))

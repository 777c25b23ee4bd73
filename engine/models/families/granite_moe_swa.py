"""Granite with windows and experts."""

from __future__ import annotations

from dataclasses import replace

from engine.models.families import granite_moe_shared, granite_swa
from engine.models.families.common import read_shape
from engine.models.fields import Fields
from engine.models.spec import Experts, ModelSpec, share

# What an absent field means: GraniteMoeSWAConfig of transformers.
DEFAULTS = {**granite_moe_shared.DEFAULTS, "sliding_window": 128}


def read_spec(fields: Fields) -> ModelSpec:
    """Its experts are called by other names than those of Granite 3."""
    shape = read_shape(fields)
    spec = granite_moe_shared.shared_model(fields, shape, granite_swa.read_attention(fields, shape))
    layers = []
    for layer in spec.layers:
        experts = layer.feed_forward
        assert isinstance(experts, Experts)
        experts = replace(
            experts,
            router=replace(experts.router, name="block_sparse_moe.router"),
            gate_up=("block_sparse_moe.experts.{}.gate_up_proj",),
            down="block_sparse_moe.experts.{}.down_proj",
        )
        layers.append(replace(layer, feed_forward=experts))
    return replace(spec, layers=share(layers))

"""Hunyuan with experts (A13B): Hunyuan's attention, experts, and one that all tokens share."""

from __future__ import annotations

from engine.models.families import hunyuan_dense
from engine.models.families.common import aliased, read_activation, read_shape, shared_experts
from engine.models.fields import Fields
from engine.models.spec import Experts, ModelSpec, Router

# What an absent field means: HunYuanMoEV1Config of transformers.
DEFAULTS = {**hunyuan_dense.DEFAULTS, "num_experts": 1, "moe_topk": 1}


def read_spec(fields: Fields) -> ModelSpec:
    """`moe_topk` is one number, or one for each layer, all the same."""
    fields = aliased(aliased(fields, "num_experts", "num_local_experts"), "moe_topk", "num_experts_per_tok")
    shape = read_shape(fields)
    count = fields.integer("num_experts", maximum=100_000)
    listed = fields.raw("moe_topk")
    if isinstance(listed, list) and listed and all(each == listed[0] for each in listed):
        given = fields.with_values({"moe_topk": listed[0]})
    else:
        given = fields
    chosen = given.integer("moe_topk", maximum=count)
    activation = read_activation(fields, "hidden_act")
    experts = Experts(
        count,
        chosen,
        shape.intermediate_size,
        activation,
        Router(normalize=True, name="mlp.gate.wg", wide=True),
        shared=shared_experts("shared_mlp", shape.intermediate_size, activation),
    )
    return shape.model([shape.layer(hunyuan_dense.hunyuan_attention(fields, shape), experts)] * shape.num_layers)

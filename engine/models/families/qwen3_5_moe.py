"""Qwen 3.5, 3.6 and 3.8 with experts, the text part: Qwen3-Next's layers with plain projections."""

from __future__ import annotations

from engine.models.families import qwen3_5, qwen3_next
from engine.models.families.common import read_shape
from engine.models.families.qwen2_vl import MROPE
from engine.models.fields import Fields
from engine.models.spec import ModelSpec

# What an absent field means: Qwen3_5MoeTextConfig of transformers.
DEFAULTS = {
    **qwen3_next.COMMON,
    "vocab_size": 248320,
    "hidden_size": 2048,
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "num_experts_per_tok": 8,
    "num_experts": 256,
}


def read_spec(fields: Fields) -> ModelSpec:
    # There is no other MLP.
    shape = read_shape(fields.with_values({"intermediate_size": fields.integer("moe_intermediate_size")}), offset=1.0)
    experts = qwen3_next.gated_experts(fields, normalize=True)
    layers = qwen3_next.hybrid_layers(fields, shape, [experts] * shape.num_layers, qwen3_5.PROJECTIONS, MROPE)
    return shape.model(layers, outside=qwen3_next.DRAFTING)

"""K-EXAONE: EXAONE 4's attention with norms before it, and experts by the sigmoid of a biased router."""

from __future__ import annotations

from engine.models.families import exaone4
from engine.models.families.common import read_shape
from engine.models.families.glm4_moe import sigmoid_layers, sparse_by_type
from engine.models.fields import Fields
from engine.models.spec import ModelSpec

# What an absent field means: ExaoneMoeConfig of transformers.
DEFAULTS = {
    **exaone4.DEFAULTS,
    "eos_token_id": 53,
    "moe_intermediate_size": 1024,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_shared_experts": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "n_group": 1,
    "topk_group": 1,
}


def read_spec(fields: Fields) -> ModelSpec:
    """The router's bias stands beside it."""
    shape = read_shape(fields)
    layers = sigmoid_layers(
        fields,
        shape,
        exaone4.read_attention(fields, shape),
        sparse_by_type(fields, shape.num_layers),
        experts="num_experts",
        shared="num_shared_experts",
        bias="mlp.e_score_correction_bias",
    )
    return shape.model(layers, outside=("mtp.",))

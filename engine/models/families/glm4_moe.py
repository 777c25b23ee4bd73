"""GLM-4.5 to 4.7: experts by the sigmoid of a biased router and one that all share, after dense layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from engine.models.families.common import (
    Shape,
    drafting_layers,
    read_activation,
    read_experts,
    read_shape,
    shared_experts,
)
from engine.models.families.rope import read_rope
from engine.models.fields import Fields, show
from engine.models.mixers import Mixer
from engine.models.spec import Dense, Experts, LayerSpec, ModelSpec, Router

# What an absent field means: Glm4MoeConfig of transformers.
DEFAULTS = {
    "vocab_size": 151552,
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "num_hidden_layers": 46,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "attention_bias": False,
    "moe_intermediate_size": 1408,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "n_routed_experts": 128,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "use_qk_norm": False,
}


def read_spec(fields: Fields, renamed: Mapping[str, str] | None = None) -> ModelSpec:
    """attention_bias covers q, k and v but not o. renamed: see read_rope."""
    shape = read_shape(fields)
    norms = shape.qk_norms() if fields.flag("use_qk_norm") else {}
    rope = read_rope(fields, shape, renamed=renamed)
    attention = shape.attention(rope, qkv_bias=fields.flag("attention_bias"), **norms)
    return shape.model(
        sigmoid_layers(fields, shape, [attention] * shape.num_layers),
        outside=drafting_layers(fields, shape, "num_nextn_predict_layers", "num_mtp_layers"),
    )


def sigmoid_layers(
    fields: Fields,
    shape: Shape,
    mixers: Sequence[Mixer],
    sparse: Sequence[bool] | None = None,
    *,
    bias: str = "mlp.gate.e_score_correction_bias",
    experts: str = "n_routed_experts",
    shared: str | None = "n_shared_experts",
) -> list[LayerSpec]:
    """Layers with experts as DeepSeek V3 introduced them. sparse: which; None: all after `first_k_dense_replace`.

    bias: see Router. experts, shared: the fields with the numbers of those that are chosen and that all tokens share
    (None: there are none).
    """
    activation = read_activation(fields, "hidden_act")
    num_experts, num_experts_per_token = read_experts(fields, experts, "num_local_experts")
    inner = fields.integer("moe_intermediate_size")
    groups, groups_chosen = read_groups(fields, num_experts, num_experts_per_token)
    count = 0 if shared is None else fields.integer(shared, 0, minimum=0)
    routed = Experts(
        num_experts,
        num_experts_per_token,
        inner,
        activation,
        Router(
            fields.nullable_flag("norm_topk_prob"),
            score="sigmoid",
            bias=bias,
            wide=True,
            groups=groups,
            groups_chosen=groups_chosen,
            scale=fields.number("routed_scaling_factor", above=0.0),
        ),
        shared=shared_experts("shared_experts", inner * count, activation),
    )
    mlp = Dense(shape.intermediate_size, activation)
    if sparse is None:
        dense = fields.integer("first_k_dense_replace", minimum=0)
        sparse = [index >= dense for index in range(shape.num_layers)]
    return [shape.layer(each, routed if chosen else mlp) for each, chosen in zip(mixers, sparse, strict=True)]


def read_groups(fields: Fields, num_experts: int, per_token: int) -> tuple[int, int]:
    """How many groups the experts stand in, and of how many of them a token's are chosen."""
    groups = fields.integer("n_group", 1)
    if num_experts % groups:
        fields.fail("n_group", f"({groups}) must divide the number of experts ({num_experts})")
    chosen = fields.integer("topk_group", 1, maximum=groups)
    if chosen * (num_experts // groups) < per_token:
        fields.fail("topk_group", f"({chosen} of {groups}) leaves fewer experts than num_experts_per_tok asks for")
    return groups, chosen


def sparse_by_type(fields: Fields, num_layers: int) -> list[bool]:
    """Which layers have experts: `mlp_layer_types`, else all after `first_k_dense_replace`, or after the first."""
    kinds = fields.words("mlp_layer_types")
    if not kinds:
        dense = fields.integer("first_k_dense_replace", 1, minimum=0)
        return [index >= dense for index in range(num_layers)]
    if len(kinds) != num_layers:
        fields.fail("mlp_layer_types", f"must have num_hidden_layers = {num_layers} entries, not {len(kinds)}")
    for kind in kinds:
        if kind not in ("dense", "sparse"):
            fields.fail("mlp_layer_types", f"must hold dense or sparse, not {show(kind)}")
    return [kind == "sparse" for kind in kinds]

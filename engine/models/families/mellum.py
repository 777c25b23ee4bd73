"""Mellum 2: Qwen 3's experts, windows, and a rope by the layer's type."""

from __future__ import annotations

from engine.models.families import qwen3_moe
from engine.models.families.common import read_activation, read_experts, read_shape, read_windows
from engine.models.families.glm4_moe import sparse_by_type
from engine.models.families.rope import read_rope
from engine.models.fields import Fields
from engine.models.spec import Dense, Experts, ModelSpec, Router

# What an absent field means: MellumConfig of transformers.
DEFAULTS = {
    **{
        name: value
        for name, value in qwen3_moe.DEFAULTS.items()
        if name not in ("decoder_sparse_step", "rope_theta", "use_sliding_window")
    },
    "vocab_size": 98304,
    "hidden_size": 2304,
    "intermediate_size": 7168,
    "num_hidden_layers": 28,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "sliding_window": 1024,
    "num_experts": 64,
    "moe_intermediate_size": 896,
    "norm_topk_prob": True,
}
ROPES = {
    "full_attention": {"rope_type": "default", "rope_theta": 500_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}


def read_spec(fields: Fields) -> ModelSpec:
    """Every layer sees all and has experts where the types of layers say nothing."""
    shape = read_shape(fields)
    if not fields.raw("rope_parameters"):
        fields = fields.with_values({"rope_parameters": ROPES})
    layer_types = fields.layer_types(shape.num_layers) or ("full_attention",) * shape.num_layers
    bias = fields.flag("attention_bias")
    ropes = {kind: read_rope(fields, shape, layer_type=kind) for kind in dict.fromkeys(layer_types)}
    activation = read_activation(fields, "hidden_act")
    count, chosen = read_experts(fields, "num_experts", "num_local_experts")
    experts = Experts(
        count, chosen, fields.integer("moe_intermediate_size"), activation, Router(fields.flag("norm_topk_prob"))
    )
    mlp = Dense(shape.intermediate_size, activation)
    given = fields if fields.has("mlp_layer_types") else fields.with_values({"first_k_dense_replace": 0})
    sparse = sparse_by_type(given, shape.num_layers)
    windows = read_windows(fields, shape, layer_types)
    return shape.model(
        (
            shape.layer(
                shape.attention(ropes[kind], window=window, qkv_bias=bias, output_bias=bias, **shape.qk_norms()),
                experts if each else mlp,
            )
            for kind, window, each in zip(layer_types, windows, sparse, strict=True)
        ),
        outside=("mtp.",),
    )

"""Hy3: norms on the heads of q and k, experts by the sigmoid of a biased router and one that all share."""

from __future__ import annotations

from engine.models.families.common import drafting_layers, read_activation, read_experts, read_shape, shared_experts
from engine.models.families.rope import read_rope
from engine.models.fields import Fields
from engine.models.spec import Dense, Experts, ModelSpec, Router

# What an absent field means: HYV3Config of transformers.
DEFAULTS = {
    "vocab_size": 120832,
    "hidden_size": 4096,
    "intermediate_size": 13312,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "rope_theta": 11158840.0,
    "attention_bias": False,
    "mlp_bias": False,
    "num_experts": 192,
    "num_experts_per_tok": 8,
    "num_shared_experts": 1,
    "moe_intermediate_size": 1536,
    "router_scaling_factor": 2.826,
}


def read_spec(fields: Fields) -> ModelSpec:
    """The first layer is dense, where `mlp_layer_types` (or the older `first_k_dense_replace`) says nothing else."""
    shape = read_shape(fields)
    bias = fields.flag("attention_bias")
    attention = shape.attention(read_rope(fields, shape), qkv_bias=bias, output_bias=bias, **shape.qk_norms())
    activation = read_activation(fields, "hidden_act")
    num_experts, num_experts_per_token = read_experts(fields, "num_experts", "num_local_experts")
    inner = fields.integer("moe_intermediate_size")
    experts = Experts(
        num_experts,
        num_experts_per_token,
        inner,
        activation,
        Router(
            normalize=True,
            name="mlp.router.gate",
            score="sigmoid",
            bias="mlp.expert_bias",
            wide=True,
            scale=fields.number("router_scaling_factor", above=0.0),
        ),
        shared=shared_experts("shared_mlp", inner * fields.integer("num_shared_experts", minimum=0), activation),
    )
    if fields.flag("mlp_bias"):
        fields.fail("mlp_bias", "is not supported")
    mlp = Dense(shape.intermediate_size, activation)
    dense = fields.integer("first_k_dense_replace", 1, minimum=0)
    kinds = fields.words("mlp_layer_types") or tuple(
        "dense" if layer < dense else "sparse" for layer in range(shape.num_layers)
    )
    if len(kinds) != shape.num_layers or not set(kinds) <= {"dense", "sparse"}:
        fields.fail("mlp_layer_types", f"must hold dense or sparse for each of {shape.num_layers} layers")
    return shape.model(
        (shape.layer(attention, mlp if kind == "dense" else experts) for kind in kinds),
        outside=drafting_layers(fields, shape, "num_nextn_predict_layers", "num_mtp_layers"),
    )

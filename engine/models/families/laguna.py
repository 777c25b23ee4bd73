"""Laguna: gated attention with numbers of heads by layer, ropes by the layer's type, sigmoid experts."""

from __future__ import annotations

from dataclasses import replace

from engine.models.families.common import Shape, read_activation, read_experts, read_shape, read_windows, shared_experts
from engine.models.families.glm4_moe import sparse_by_type
from engine.models.families.rope import read_rope
from engine.models.fields import MAX_SIZE, Fields, show
from engine.models.mixers import OutputGate
from engine.models.spec import Dense, Experts, ModelSpec, Router

# What an absent field means: LagunaConfig of transformers.
DEFAULTS = {
    "vocab_size": 100352,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 40,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "sliding_window": 512,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "moe_routed_scaling_factor": 1.0,
    "moe_router_logit_softcapping": 0.0,
}
ROPES = {
    "full_attention": {"rope_type": "default", "rope_theta": 500_000.0, "partial_rotary_factor": 0.5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0},
}


def read_spec(fields: Fields) -> ModelSpec:
    """Every layer sees all, and all but the first have experts, where the types of layers say nothing."""
    if fields.flag("moe_apply_router_weight_on_input"):
        fields.fail("moe_apply_router_weight_on_input", "is not supported")
    shape = read_shape(fields)
    if not fields.raw("rope_parameters"):
        fields = fields.with_values({"rope_parameters": ROPES})
    layer_types = fields.layer_types(shape.num_layers) or ("full_attention",) * shape.num_layers
    ropes = {kind: read_rope(fields, shape, layer_type=kind) for kind in dict.fromkeys(layer_types)}
    gating = fields.raw("gating")
    if gating not in (None, True, False, "per-head", "per-element"):
        fields.fail("gating", f"must be true, per-head or per-element, not {show(gating)}")
    gate = OutputGate("self_attn.g_proj", "softplus", by_head=gating in (None, True, "per-head"))
    bias = fields.flag("attention_bias")
    experts, mlp = _read_experts(fields), Dense(shape.intermediate_size, read_activation(fields, "hidden_act"))
    layers = []
    for kind, window, heads, sparse in zip(
        layer_types,
        read_windows(fields, shape, layer_types),
        _read_heads(fields, shape),
        sparse_by_type(fields, shape.num_layers),
        strict=True,
    ):
        attention = replace(shape, num_heads=heads).attention(
            ropes[kind], window=window, qkv_bias=bias, output_bias=bias, gate=gate, **shape.qk_norms()
        )
        layers.append(shape.layer(attention, experts if sparse else mlp))
    return shape.model(layers)


def _read_heads(fields: Fields, shape: Shape) -> tuple[int, ...]:
    heads = fields.integers("num_attention_heads_per_layer") or (shape.num_heads,) * shape.num_layers
    if len(heads) != shape.num_layers:
        count = f"num_hidden_layers = {shape.num_layers} entries, not {len(heads)}"
        fields.fail("num_attention_heads_per_layer", f"must have {count}")
    for each in heads:
        if not 1 <= each <= MAX_SIZE or each % shape.num_kv_heads:
            fields.fail("num_attention_heads_per_layer", f"({each}) must be a multiple of num_key_value_heads")
    return heads


def _read_experts(fields: Fields) -> Experts:
    count, chosen = read_experts(fields, "num_experts", "num_local_experts")
    activation = read_activation(fields, "hidden_act")
    softcap = fields.number("moe_router_logit_softcapping", minimum=0.0)
    return Experts(
        count,
        chosen,
        fields.integer("moe_intermediate_size"),
        activation,
        Router(
            normalize=True,
            score="sigmoid",
            bias="mlp.experts.e_score_correction_bias",
            scale=fields.number("moe_routed_scaling_factor", above=0.0),
            softcap=softcap or None,
        ),
        shared=shared_experts("shared_expert", fields.integer("shared_expert_intermediate_size"), activation),
    )

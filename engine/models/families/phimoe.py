"""Phi-3.5-MoE and Phi-mini-MoE: Mixtral's layers with LayerNorm and a router that looks at close experts alone."""

from __future__ import annotations

import dataclasses

from engine.models.families.common import read_activation, read_experts, read_shape, read_windows
from engine.models.families.rope import read_rope, scaling_fields
from engine.models.fields import Fields
from engine.models.spec import Experts, ModelSpec, Router

# What an absent field means: PhimoeConfig of transformers.
DEFAULTS = {
    "vocab_size": 32064,
    "hidden_size": 4096,
    "intermediate_size": 6400,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "rope_theta": 1e6,
    "num_experts_per_tok": 2,
    "num_local_experts": 16,
    "router_jitter_noise": 0.01,
    "attention_bias": False,
    "lm_head_bias": False,
}


def read_spec(fields: Fields) -> ModelSpec:
    """Of a scaled rope, long_mscale and short_mscale are the factor on cosines and sines."""
    shape = read_shape(fields, centered=True, bias=True)
    rope, scaling = read_rope(fields, shape), scaling_fields(fields)
    if rope.kind != "default":
        long, short = (scaling.number(name, above=0.0) for name in ("long_mscale", "short_mscale"))
        if long != short:
            scaling.fail("long_mscale", f"({long:g}) is not short_mscale ({short:g}), which is not supported")
        rope = dataclasses.replace(rope, attention_scaling=long)
    count, chosen = read_experts(fields, "num_local_experts", "num_experts")
    if chosen != 2:
        fields.fail("num_experts_per_tok", f"must be 2 in this class, not {chosen}")
    experts = Experts(
        count,
        chosen,
        shape.intermediate_size,
        read_activation(fields, "hidden_act"),
        Router(
            normalize=False,
            name="block_sparse_moe.gate",
            near=2 * fields.number("router_jitter_noise", minimum=0.0),
        ),
        gate_up=("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3"),
        down="block_sparse_moe.experts.{}.w2",
    )
    bias, head_bias = fields.flag("attention_bias"), fields.flag("lm_head_bias")
    if head_bias and fields.flag("tie_word_embeddings"):
        fields.fail("tie_word_embeddings", "is not supported where lm_head_bias is true")
    windows = read_windows(fields, shape, ("sliding_attention",) * shape.num_layers)
    return shape.model(
        (
            shape.layer(shape.attention(rope, window=window, qkv_bias=bias, output_bias=bias), experts)
            for window in windows
        ),
        head_bias=head_bias,
    )

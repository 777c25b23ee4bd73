"""Qwen 3 with experts: Qwen 3's attention, and a mixture of experts in all or some of the layers."""

from __future__ import annotations

from dataclasses import replace

from engine.models.families.common import Shape, read_activation, read_experts, read_shape, read_windows
from engine.models.families.rope import read_rope
from engine.models.fields import Fields
from engine.models.spec import Dense, Experts, ModelSpec, Router

# What an absent field means: Qwen3MoeConfig of transformers.
DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
    "num_experts": 128,
    "norm_topk_prob": False,
}


def read_spec(fields: Fields) -> ModelSpec:
    shape = read_shape(fields)
    bias = fields.flag("attention_bias")
    attention = shape.attention(read_rope(fields, shape), qkv_bias=bias, output_bias=bias, **shape.qk_norms())
    kind = "sliding_attention" if fields.flag("use_sliding_window") else "full_attention"
    windows = read_windows(fields, shape, (kind,) * shape.num_layers)
    num_experts, num_experts_per_token = read_experts(fields, "num_experts", "num_local_experts")
    activation = read_activation(fields, "hidden_act")
    mlp = Dense(shape.intermediate_size, activation)
    experts = Experts(
        num_experts,
        num_experts_per_token,
        fields.integer("moe_intermediate_size"),
        activation,
        Router(fields.flag("norm_topk_prob")),
    )
    return shape.model(
        shape.layer(replace(attention, window=window), experts if sparse else mlp)
        for window, sparse in zip(windows, sparse_layers(fields, shape), strict=True)
    )


def sparse_layers(fields: Fields, shape: Shape) -> list[bool]:
    """Layer i has experts unless `mlp_only_layers` lists it or `decoder_sparse_step` does not divide i + 1."""
    step, plain = fields.integer("decoder_sparse_step"), fields.integers("mlp_only_layers")
    return [(index + 1) % step == 0 and index not in plain for index in range(shape.num_layers)]

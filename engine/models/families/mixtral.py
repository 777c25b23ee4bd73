"""Mixtral: Mistral's attention with a mixture of experts in every layer."""

from __future__ import annotations

from engine.models.families.common import read_activation, read_experts, read_shape, read_windows
from engine.models.families.rope import read_rope
from engine.models.fields import Fields
from engine.models.spec import Experts, ModelSpec, Router

# What an absent field means: MixtralConfig of transformers.
DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
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
    "num_local_experts": 8,
}


def read_spec(fields: Fields) -> ModelSpec:
    shape = read_shape(fields)
    rope = read_rope(fields, shape)
    windows = read_windows(fields, shape, ("sliding_attention",) * shape.num_layers)
    num_experts, num_experts_per_token = read_experts(fields, "num_local_experts", "num_experts")
    experts = Experts(
        num_experts,
        num_experts_per_token,
        shape.intermediate_size,
        read_activation(fields, "hidden_act"),
        Router(normalize=True, name="block_sparse_moe.gate"),
        gate_up=("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3"),
        down="block_sparse_moe.experts.{}.w2",
    )
    return shape.model(shape.layer(shape.attention(rope, window=window), experts) for window in windows)

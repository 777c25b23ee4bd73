"""Mixtral: Mistral's attention with a mixture of experts in every layer."""

from __future__ import annotations

from engine.models.config import (
    ExpertsConfig,
    ModelConfig,
    WeightNames,
    read_activation,
    read_experts,
    read_rope,
    read_shape,
    read_windows,
)
from engine.models.fields import Fields

NAMES = WeightNames(
    router="block_sparse_moe.gate",
    expert_gate_up=("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3"),
    expert_down="block_sparse_moe.experts.{}.w2",
)


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


def read_config(fields: Fields) -> ModelConfig:
    shape = read_shape(fields)
    num_experts, num_experts_per_token = read_experts(fields, "num_local_experts", "num_experts")
    return ModelConfig(
        **shape.common,
        rope=read_rope(fields, shape),
        attention_scale=shape.head_dim**-0.5,
        windows=read_windows(fields, shape, ("sliding_attention",) * shape.num_layers),
        activation=read_activation(fields, "hidden_act"),
        experts=ExpertsConfig(
            num_experts=num_experts,
            num_experts_per_token=num_experts_per_token,
            intermediate_size=shape.common["intermediate_size"],
            normalize=True,
            layers=(True,) * shape.num_layers,
        ),
        names=NAMES,
    )

"""Mixtral: Mistral's attention with a mixture of experts in every layer."""

from __future__ import annotations

from engine.models.config import (
    ExpertsConfig,
    Fields,
    ModelConfig,
    WeightNames,
    read_activation,
    read_experts,
    read_rope,
    read_shape,
    read_windows,
)

NAMES = WeightNames(
    router="block_sparse_moe.gate",
    expert_gate_up=("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3"),
    expert_down="block_sparse_moe.experts.{}.w2",
)


def read_config(fields: Fields) -> ModelConfig:
    shape = read_shape(fields)
    num_experts, num_experts_per_token = read_experts(fields, "num_local_experts", 8, 2)
    return ModelConfig(
        **shape.common,
        rope=read_rope(fields, shape, theta=1e6),
        attention_scale=shape.head_dim**-0.5,
        windows=read_windows(fields, shape, ("sliding_attention",) * shape.num_layers, default=None),
        activation=read_activation(fields, "hidden_act", "silu"),
        experts=ExpertsConfig(
            num_experts=num_experts,
            num_experts_per_token=num_experts_per_token,
            intermediate_size=shape.common["intermediate_size"],
            normalize=True,
            layers=(True,) * shape.num_layers,
        ),
        names=NAMES,
    )

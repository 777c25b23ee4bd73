"""Qwen 3 with experts: Qwen 3's attention, and a mixture of experts in all or some of the layers."""

from __future__ import annotations

from engine.models.config import (
    ExpertsConfig,
    Fields,
    ModelConfig,
    read_activation,
    read_experts,
    read_rope,
    read_shape,
    read_windows,
)


def read_config(fields: Fields) -> ModelConfig:
    """Layer i has experts unless `mlp_only_layers` lists it or `decoder_sparse_step` does not divide i + 1."""
    shape = read_shape(fields)
    attention_bias = fields.flag("attention_bias", False)
    sliding = fields.flag("use_sliding_window", False)
    num_experts, num_experts_per_token = read_experts(
        fields, "num_experts" if fields.has("num_experts") else "num_local_experts", 128, 8
    )
    step = fields.integer("decoder_sparse_step", 1)
    plain = fields.integers("mlp_only_layers")
    return ModelConfig(
        **shape.common,
        rope=read_rope(fields, shape),
        attention_scale=shape.head_dim**-0.5,
        windows=read_windows(fields, shape, ("sliding_attention" if sliding else "full_attention",) * shape.num_layers),
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        qk_norm="head",
        activation=read_activation(fields, "hidden_act", "silu"),
        experts=ExpertsConfig(
            num_experts=num_experts,
            num_experts_per_token=num_experts_per_token,
            intermediate_size=fields.integer("moe_intermediate_size", 768),
            normalize=fields.flag("norm_topk_prob", False),
            layers=tuple((i + 1) % step == 0 and i not in plain for i in range(shape.num_layers)),
        ),
    )

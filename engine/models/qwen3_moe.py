"""Qwen 3 with experts: Qwen 3's attention, and a mixture of experts in all or some of the layers."""

from __future__ import annotations

from engine.models.config import (
    ExpertsConfig,
    ModelConfig,
    read_activation,
    read_experts,
    read_rope,
    read_shape,
    read_windows,
)
from engine.models.fields import Fields

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


def read_config(fields: Fields) -> ModelConfig:
    """Layer i has experts unless `mlp_only_layers` lists it or `decoder_sparse_step` does not divide i + 1."""
    shape = read_shape(fields)
    attention_bias = fields.flag("attention_bias")
    sliding = fields.flag("use_sliding_window")
    num_experts, num_experts_per_token = read_experts(fields, "num_experts", "num_local_experts")
    step = fields.integer("decoder_sparse_step")
    plain = fields.integers("mlp_only_layers")
    return ModelConfig(
        **shape.common,
        rope=read_rope(fields, shape),
        attention_scale=shape.head_dim**-0.5,
        windows=read_windows(fields, shape, ("sliding_attention" if sliding else "full_attention",) * shape.num_layers),
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        qk_norm="head",
        activation=read_activation(fields, "hidden_act"),
        experts=ExpertsConfig(
            num_experts=num_experts,
            num_experts_per_token=num_experts_per_token,
            intermediate_size=fields.integer("moe_intermediate_size"),
            normalize=fields.flag("norm_topk_prob"),
            layers=tuple((i + 1) % step == 0 and i not in plain for i in range(shape.num_layers)),
        ),
    )

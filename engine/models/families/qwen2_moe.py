"""Qwen 1.5 and 2 with experts: Qwen 2's attention, experts, and one that all tokens share by a gate."""

from __future__ import annotations

from engine.models.families.common import read_activation, read_experts, read_shape, read_windows, shared_experts
from engine.models.families.qwen3_moe import sparse_layers
from engine.models.families.rope import read_rope
from engine.models.fields import Fields
from engine.models.spec import Dense, Experts, ModelSpec, Router

# What an absent field means: Qwen2MoeConfig of transformers.
DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_experts_per_tok": 4,
    "num_experts": 60,
    "norm_topk_prob": False,
    "qkv_bias": True,
}


def read_spec(fields: Fields) -> ModelSpec:
    """Where `layer_types` says nothing, every other layer below `max_window_layers` has the window, if any is used."""
    shape = read_shape(fields)
    windows: tuple[int | None, ...] = (None,) * shape.num_layers
    if fields.flag("use_sliding_window"):
        last = fields.integer("max_window_layers", minimum=0)
        layer_types = fields.layer_types(shape.num_layers) or tuple(
            "full_attention" if layer % 2 or layer >= last else "sliding_attention" for layer in range(shape.num_layers)
        )
        windows = read_windows(fields, shape, layer_types)
    rope, bias = read_rope(fields, shape), fields.flag("qkv_bias")
    activation = read_activation(fields, "hidden_act")
    num_experts, num_experts_per_token = read_experts(fields, "num_experts", "num_local_experts")
    experts = Experts(
        num_experts,
        num_experts_per_token,
        fields.integer("moe_intermediate_size"),
        activation,
        Router(fields.flag("norm_topk_prob")),
        shared=shared_experts("shared_expert", fields.integer("shared_expert_intermediate_size"), activation),
        shared_gate="mlp.shared_expert_gate",
    )
    mlp = Dense(shape.intermediate_size, activation)
    return shape.model(
        shape.layer(shape.attention(rope, window=window, qkv_bias=bias), experts if sparse else mlp)
        for window, sparse in zip(windows, sparse_layers(fields, shape), strict=True)
    )

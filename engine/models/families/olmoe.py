"""OLMoE: norms on q and k over all heads at once, and experts in every layer."""

from __future__ import annotations

from engine.models.families.common import read_activation, read_experts, read_shape
from engine.models.families.rope import read_rope
from engine.models.fields import Fields
from engine.models.spec import Experts, ModelSpec, Router

# What an absent field means: OlmoeConfig of transformers.
DEFAULTS = {
    "vocab_size": 50304,
    "hidden_size": 2048,
    "intermediate_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "eos_token_id": 50279,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "num_experts_per_tok": 8,
    "num_experts": 64,
    "norm_topk_prob": False,
}


def read_spec(fields: Fields) -> ModelSpec:
    shape = read_shape(fields)
    if fields.raw("clip_qkv") is not None:
        fields.fail("clip_qkv", "is not supported")
    bias = fields.flag("attention_bias")
    attention = shape.attention(
        read_rope(fields, shape), qkv_bias=bias, output_bias=bias, norm_width="full", **shape.qk_norms()
    )
    num_experts, num_experts_per_token = read_experts(fields, "num_experts", "num_local_experts")
    router = Router(fields.flag("norm_topk_prob"))
    activation = read_activation(fields, "hidden_act")
    experts = Experts(num_experts, num_experts_per_token, shape.intermediate_size, activation, router)
    return shape.model([shape.layer(attention, experts)] * shape.num_layers)

"""MiniMax M2: norms on q and k over all heads at once, half a rope, experts by the sigmoid of a biased router."""

from __future__ import annotations

from engine.models.families.common import drafting_layers, read_activation, read_experts, read_shape
from engine.models.families.rope import read_rope
from engine.models.fields import Fields
from engine.models.spec import Experts, ModelSpec, Router

# What an absent field means: MiniMaxM2Config of transformers.
DEFAULTS = {
    "vocab_size": 200064,
    "hidden_size": 3072,
    "intermediate_size": 1536,
    "num_hidden_layers": 62,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 196608,
    "rms_norm_eps": 1e-06,
    "eos_token_id": 200020,
    "tie_word_embeddings": False,
    "rope_theta": 5000000.0,
    "num_experts_per_tok": 8,
    "num_local_experts": 256,
}


def read_spec(fields: Fields) -> ModelSpec:
    """Files of the first release have `rotary_dim` in place of a share of the head."""
    shape = read_shape(fields)
    given = fields
    if fields.has("rotary_dim"):
        rotary_dim = fields.integer("rotary_dim", maximum=shape.head_dim)
        given = fields.with_values({"partial_rotary_factor": rotary_dim / shape.head_dim})
    attention = shape.attention(read_rope(given, shape), norm_width="full", **shape.qk_norms())
    num_experts, num_experts_per_token = read_experts(fields, "num_local_experts", "num_experts")
    experts = Experts(
        num_experts,
        num_experts_per_token,
        shape.intermediate_size,
        read_activation(fields, "hidden_act"),
        Router(
            normalize=True,
            name="block_sparse_moe.gate",
            score="sigmoid",
            bias="block_sparse_moe.e_score_correction_bias",
            wide=True,
        ),
        gate_up=("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3"),
        down="block_sparse_moe.experts.{}.w2",
    )
    outside = drafting_layers(fields, shape, "num_mtp_modules") if fields.raw("use_mtp") else ()
    return shape.model([shape.layer(attention, experts)] * shape.num_layers, outside=outside)

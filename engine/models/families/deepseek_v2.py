"""DeepSeek V2 and V2-Lite: latent attention, and experts by softmax whose shares are never made to add up to 1."""

from __future__ import annotations

import dataclasses

from engine.models.families.common import read_activation, read_experts, shared_experts
from engine.models.families.glm4_moe import read_groups
from engine.models.families.latent import read_latent, refuse_other_routing
from engine.models.fields import Fields
from engine.models.spec import Dense, Experts, ModelSpec, Router

# What an absent field means: DeepseekV2Config of transformers.
DEFAULTS = {
    "vocab_size": 102400,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-06,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "first_k_dense_replace": 0,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "routed_scaling_factor": 1.0,
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "v_head_dim": 128,
    "moe_intermediate_size": 1407,
}


def read_spec(fields: Fields) -> ModelSpec:
    """Groups count where `topk_method` says so; norm_topk_prob means nothing in transformers, something elsewhere."""
    refuse_other_routing(fields, {"scoring_func": "softmax", "moe_layer_freq": 1, "norm_topk_prob": False})
    shape, attention = read_latent(fields, interleaved=True)
    activation, bias = read_activation(fields, "hidden_act"), fields.flag("mlp_bias")
    num_experts, chosen = read_experts(fields, "n_routed_experts", "num_experts")
    grouped = fields.choice("topk_method", ("greedy", "group_limited_greedy")) != "greedy"
    groups, groups_chosen = read_groups(fields, num_experts, chosen) if grouped else (1, 1)
    inner = fields.integer("moe_intermediate_size")
    shared = shared_experts("shared_experts", inner * fields.integer("n_shared_experts", 0, minimum=0), activation)
    experts = Experts(
        num_experts,
        chosen,
        inner,
        activation,
        Router(
            normalize=False,
            wide=True,
            groups=groups,
            groups_chosen=groups_chosen,
            group_best=1,
            scale=fields.number("routed_scaling_factor", above=0.0),
        ),
        shared=None if shared is None else dataclasses.replace(shared, bias=bias),
    )
    mlp = Dense(shape.intermediate_size, activation, bias=bias)
    dense = fields.integer("first_k_dense_replace", minimum=0)
    return shape.model(shape.layer(attention, mlp if layer < dense else experts) for layer in range(shape.num_layers))

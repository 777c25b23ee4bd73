"""Mistral Small 4: latent attention whose queries grow beyond the original context, experts by softmax in groups."""

from __future__ import annotations

import dataclasses

from engine.models.families.common import read_activation, read_experts, shared_experts
from engine.models.families.glm4_moe import read_groups
from engine.models.families.latent import read_latent
from engine.models.families.ministral3 import read_query_scale
from engine.models.fields import Fields
from engine.models.spec import Dense, Experts, ModelSpec, Router

# What an absent field means: Mistral4Config of transformers.
DEFAULTS = {
    "vocab_size": 131072,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "n_shared_experts": 1,
    "n_routed_experts": 128,
    "routed_scaling_factor": 1.0,
    "kv_lora_rank": 256,
    "q_lora_rank": 1024,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 64,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 0,
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "max_position_embeddings": 1048576,
    "rms_norm_eps": 1e-06,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "rope_interleave": True,
    "attention_bias": False,
}


ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 128.0,
    "original_max_position_embeddings": 8192,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def read_spec(fields: Fields) -> ModelSpec:
    """partial_rotary_factor is what the turned part is of a whole head."""
    given = fields
    if not fields.has("rope_parameters") and not fields.has("rope_scaling"):
        given = fields.with_values({"rope_parameters": ROPE})
    shape, attention = read_latent(given, partial=True)
    assert attention.rope is not None
    attention = dataclasses.replace(attention, query_scale=read_query_scale(given, attention.rope, shape))
    activation = read_activation(fields, "hidden_act")
    num_experts, chosen = read_experts(fields, "n_routed_experts", "num_local_experts")
    groups, groups_chosen = read_groups(fields, num_experts, chosen)
    inner = fields.integer("moe_intermediate_size")
    experts = Experts(
        num_experts,
        chosen,
        inner,
        activation,
        Router(
            fields.nullable_flag("norm_topk_prob"),
            groups=groups,
            groups_chosen=groups_chosen,
            scale=fields.number("routed_scaling_factor", above=0.0),
        ),
        gate_up=("mlp.experts.{}.gate_up_proj",),
        stacked="rows",
        shared=shared_experts("shared_experts", inner * fields.integer("n_shared_experts", 0, minimum=0), activation),
    )
    mlp = Dense(shape.intermediate_size, activation)
    dense = fields.integer("first_k_dense_replace", minimum=0)
    return shape.model(shape.layer(attention, mlp if layer < dense else experts) for layer in range(shape.num_layers))

"""Ling 2 and Ring 2: Sarvam's layers, with a rope over half of a head and experts in groups."""

from __future__ import annotations

from engine.models.families import sarvam_moe
from engine.models.families.latent import refuse_other_routing
from engine.models.fields import Fields
from engine.models.spec import ModelSpec

# What an absent field means in its own code: transformers has no such class.
DEFAULTS = {
    **sarvam_moe.DEFAULTS,
    "vocab_size": 157184,
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "eos_token_id": 156892,
    "rope_theta": 600000.0,
    "partial_rotary_factor": 0.5,
    "moe_intermediate_size": 512,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
}


def read_spec(fields: Fields) -> ModelSpec:
    refuse_other_routing(
        fields,
        {"score_function": "sigmoid", "moe_router_enable_expert_bias": True, "use_bias": False, "use_rmsnorm": True},
    )
    return sarvam_moe.read_spec(fields)

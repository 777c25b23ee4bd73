"""DeepSeek V3, R1 and V3.1, and what has their layers (Kimi K2, Moonlight): latent attention, experts in groups."""

from __future__ import annotations

from engine.models.families.common import drafting_layers
from engine.models.families.glm4_moe import sigmoid_layers
from engine.models.families.latent import read_latent, refuse_other_routing
from engine.models.fields import Fields
from engine.models.spec import ModelSpec

# What an absent field means: DeepseekV3Config of transformers.
DEFAULTS = {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-06,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "rope_interleave": True,
    "attention_bias": False,
    "num_mtp_layers": 1,
}


def read_spec(fields: Fields) -> ModelSpec:
    """The layers past the last guess several tokens at once and are left out."""
    refuse_other_routing(fields, {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1})
    shape, attention = read_latent(fields)
    return shape.model(
        sigmoid_layers(fields, shape, [attention] * shape.num_layers),
        outside=drafting_layers(fields, shape, "num_nextn_predict_layers", "num_mtp_layers"),
    )

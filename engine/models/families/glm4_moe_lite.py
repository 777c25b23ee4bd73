"""GLM-4.7-Flash: latent attention with the experts of GLM-4.5 to 4.7."""

from __future__ import annotations

from engine.models.families.common import drafting_layers
from engine.models.families.glm4_moe import sigmoid_layers, sparse_by_type
from engine.models.families.latent import read_latent, refuse_other_routing
from engine.models.fields import Fields
from engine.models.spec import ModelSpec

# What an absent field means: Glm4MoeLiteConfig of transformers.
DEFAULTS = {
    "vocab_size": 154880,
    "hidden_size": 2048,
    "intermediate_size": 10240,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 47,
    "num_attention_heads": 20,
    "num_key_value_heads": 20,
    "n_shared_experts": 1,
    "n_routed_experts": 64,
    "routed_scaling_factor": 1.8,
    "kv_lora_rank": 512,
    "q_lora_rank": 768,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
    "qk_nope_head_dim": 192,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "max_position_embeddings": 202752,
    "rms_norm_eps": 1e-05,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "rope_interleave": True,
    "attention_bias": False,
}


def read_spec(fields: Fields) -> ModelSpec:
    """Layers are dense as `mlp_layer_types` says, else as `first_k_dense_replace` does, which is 1."""
    refuse_other_routing(fields, {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1})
    shape, attention = read_latent(fields)
    sparse = sparse_by_type(fields, shape.num_layers)
    return shape.model(
        sigmoid_layers(fields, shape, [attention] * shape.num_layers, sparse),
        outside=drafting_layers(fields, shape, "num_nextn_predict_layers", "num_mtp_layers"),
    )

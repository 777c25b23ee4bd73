"""Youtu-LLM: Llama with the latent attention of DeepSeek V3."""

from __future__ import annotations

from engine.models.families.common import read_activation
from engine.models.families.latent import read_latent
from engine.models.fields import Fields
from engine.models.spec import Dense, ModelSpec

# What an absent field means: YoutuConfig of transformers.
DEFAULTS = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-06,
    "eos_token_id": 128001,
    "tie_word_embeddings": True,
    "rope_theta": 10000.0,
    "rope_interleave": True,
    "attention_bias": False,
}


def read_spec(fields: Fields) -> ModelSpec:
    """Every layer is dense."""
    shape, attention = read_latent(fields)
    mlp = Dense(shape.intermediate_size, read_activation(fields, "hidden_act"))
    return shape.model([shape.layer(attention, mlp)] * shape.num_layers)

"""MiniCPM 3: latent attention in a dense model whose embedding, residuals and logits are scaled."""

from __future__ import annotations

import math

from engine.models.families.common import read_activation
from engine.models.families.latent import read_latent
from engine.models.fields import Fields
from engine.models.spec import Dense, ModelSpec

# What an absent field means: MiniCPM3Config of transformers.
DEFAULTS = {
    "vocab_size": 73448,
    "hidden_size": 2560,
    "intermediate_size": 6400,
    "num_hidden_layers": 62,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-05,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "kv_lora_rank": 256,
    "q_lora_rank": 768,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "scale_emb": 12,
    "scale_depth": 1.4,
    "dim_model_base": 256,
}


def read_spec(fields: Fields) -> ModelSpec:
    """Halves of a head turn together, not neighbours. A null in scale_depth or dim_model_base is no scale."""
    shape, attention = read_latent(fields, interleaved=False)
    mlp = Dense(shape.intermediate_size, read_activation(fields, "hidden_act"), bias=fields.flag("mlp_bias"))
    depth = fields.number("scale_depth", above=0.0) if fields.has("scale_depth") else math.sqrt(shape.num_layers)
    base = fields.integer("dim_model_base") if fields.has("dim_model_base") else shape.hidden_size
    return shape.model(
        [shape.layer(attention, mlp, residual_scale=depth / math.sqrt(shape.num_layers))] * shape.num_layers,
        embedding_scale=fields.number("scale_emb", above=0.0),
        logit_scale=base / shape.hidden_size,
    )

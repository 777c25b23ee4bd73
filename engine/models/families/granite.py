"""Granite 3 and 4 (dense): Llama's layers with a factor on embeddings, on what a layer adds, and on logits."""

from __future__ import annotations

from typing import Any

from engine.models.families.common import read_activation, read_shape
from engine.models.families.rope import read_rope
from engine.models.fields import Fields
from engine.models.spec import Dense, ModelSpec

# What an absent field means: GraniteConfig of transformers.
COMMON = {
    "vocab_size": 32000,
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
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
}
DEFAULTS = {**COMMON, "mlp_bias": False}


def read_spec(fields: Fields) -> ModelSpec:
    shape = read_shape(fields)
    bias = fields.flag("attention_bias")
    scale = fields.number("attention_multiplier", above=0.0)
    attention = shape.attention(read_rope(fields, shape), scale=scale, qkv_bias=bias, output_bias=bias)
    mlp = Dense(shape.intermediate_size, read_activation(fields, "hidden_act"), bias=fields.flag("mlp_bias"))
    layer = shape.layer(attention, mlp, residual_scale=fields.number("residual_multiplier", above=0.0))
    return shape.model([layer] * shape.num_layers, **granite_scales(fields))


def granite_scales(fields: Fields) -> dict[str, Any]:
    """Fields of ModelSpec."""
    return {
        "embedding_scale": fields.number("embedding_multiplier", above=0.0),
        "logit_scale": 1 / fields.number("logits_scaling", above=0.0),
    }

"""Ministral 3 and Devstral 2: Mistral's layers, with queries that grow beyond the original context."""

from __future__ import annotations

from engine.models.families.common import Shape, read_activation, read_shape, read_windows
from engine.models.families.rope import read_rope, scaling_fields
from engine.models.fields import Fields
from engine.models.mixers import QueryScale, RopeSpec
from engine.models.spec import Dense, ModelSpec

# What an absent field means: Ministral3Config of transformers.
DEFAULTS = {
    "vocab_size": 131072,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 34,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-05,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "rope_theta": 1000000.0,
}


ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1000000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def read_spec(fields: Fields) -> ModelSpec:
    """All layers have the window, where there is one."""
    shape = read_shape(fields)
    given = fields
    if not fields.has("rope_parameters") and not fields.has("rope_scaling"):
        given = fields.with_values({"rope_parameters": ROPE})
    rope = read_rope(given, shape)
    scale = read_query_scale(given, rope, shape)
    mlp = Dense(shape.intermediate_size, read_activation(fields, "hidden_act"))
    windows = read_windows(fields, shape, ("sliding_attention",) * shape.num_layers)
    return shape.model(shape.layer(shape.attention(rope, window=window, query_scale=scale), mlp) for window in windows)


def read_query_scale(fields: Fields, rope: RopeSpec, shape: Shape) -> QueryScale | None:
    """None where the rope has no `llama_4_scaling_beta`."""
    beta = scaling_fields(fields).number("llama_4_scaling_beta", 0.0, minimum=0.0)
    return QueryScale(beta, rope.original_max_position or shape.max_position_embeddings) if beta else None

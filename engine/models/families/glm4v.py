"""The text part of GLM-4.1V and 4.6V-Flash: GLM-4's layers, with a rope of three axes that are one for text."""

from __future__ import annotations

from engine.models.families import glm4
from engine.models.families.qwen2_vl import MROPE
from engine.models.fields import Fields
from engine.models.spec import ModelSpec

# What an absent field means: Glm4vTextConfig of transformers, which has no attention_bias: there is one.
DEFAULTS = {
    "vocab_size": 151552,
    "hidden_size": 4096,
    "intermediate_size": 13696,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "attention_bias": True,
}


def read_spec(fields: Fields) -> ModelSpec:
    return glm4.read_spec(fields, MROPE)

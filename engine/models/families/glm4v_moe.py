"""The text part of GLM-4.5V and 4.6V: GLM-4.5's layers, with a rope of three axes that are one for text."""

from __future__ import annotations

from engine.models.families import glm4_moe
from engine.models.families.qwen2_vl import MROPE
from engine.models.fields import Fields
from engine.models.spec import ModelSpec

# What an absent field means: Glm4vMoeTextConfig of transformers.
DEFAULTS = {
    **glm4_moe.DEFAULTS,
    "vocab_size": 151424,
    "max_position_embeddings": 65536,
    "attention_bias": True,
}


def read_spec(fields: Fields) -> ModelSpec:
    return glm4_moe.read_spec(fields, MROPE)

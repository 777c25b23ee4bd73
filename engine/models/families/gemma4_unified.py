"""Gemma 4 12B, which sees and hears without towers: Gemma 4 without inputs of a layer's own and without experts."""

from __future__ import annotations

from engine.models.families import gemma4
from engine.models.fields import Fields
from engine.models.spec import ModelSpec

_OTHERS = ("vocab_size_per_layer_input", "hidden_size_per_layer_input", "enable_moe_block")
# What an absent field means: Gemma4UnifiedTextConfig of transformers.
DEFAULTS = {name: value for name, value in gemma4.DEFAULTS.items() if name not in _OTHERS} | {
    "max_position_embeddings": 262144,
    "sliding_window": 1024,
}


def read_spec(fields: Fields) -> ModelSpec:
    return gemma4.read_spec(fields.with_values({"hidden_size_per_layer_input": 0, "enable_moe_block": False}))

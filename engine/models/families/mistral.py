"""Mistral: Llama's layers, with a sliding window over all of them in some releases."""

from __future__ import annotations

from engine.models.families.common import read_activation, read_shape, read_windows
from engine.models.families.rope import read_rope
from engine.models.fields import Fields
from engine.models.spec import Dense, ModelSpec

# What an absent field means: MistralConfig of transformers.
DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-06,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
}


def read_spec(fields: Fields) -> ModelSpec:
    """All layers have the window where `layer_types` says nothing."""
    shape = read_shape(fields)
    layer_types = fields.layer_types(shape.num_layers) or ("sliding_attention",) * shape.num_layers
    windows = read_windows(fields, shape, layer_types)
    rope = read_rope(fields, shape)
    mlp = Dense(shape.intermediate_size, read_activation(fields, "hidden_act"))
    return shape.model(shape.layer(shape.attention(rope, window=window), mlp) for window in windows)

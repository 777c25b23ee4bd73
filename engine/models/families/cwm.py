"""Code World Model: Llama 3 with windows in three of four layers."""

from __future__ import annotations

from engine.models.families import llama
from engine.models.families.common import read_activation, read_shape, read_windows
from engine.models.families.rope import read_rope
from engine.models.fields import Fields
from engine.models.spec import Dense, ModelSpec

# What an absent field means: CwmConfig of transformers.
DEFAULTS = {
    **{name: value for name, value in llama.DEFAULTS.items() if name != "attention_bias"},
    "vocab_size": 128256,
    "hidden_size": 6144,
    "intermediate_size": 21504,
    "num_hidden_layers": 64,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "eos_token_id": [128001, 128008, 128009],
    "rope_theta": 1e6,
    "sliding_window": 8192,
}
ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e6,
    "factor": 16.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}


def read_spec(fields: Fields) -> ModelSpec:
    """Every fourth layer, the first one among them, sees all, where `layer_types` says nothing."""
    shape = read_shape(fields)
    layer_types = fields.layer_types(shape.num_layers) or tuple(
        "sliding_attention" if layer % 4 else "full_attention" for layer in range(shape.num_layers)
    )
    if not fields.has("rope_parameters") and not fields.has("rope_scaling"):
        fields = fields.with_values({"rope_parameters": ROPE})
    rope, windows = read_rope(fields, shape), read_windows(fields, shape, layer_types)
    mlp = Dense(shape.intermediate_size, read_activation(fields, "hidden_act"), bias=fields.flag("mlp_bias"))
    return shape.model(shape.layer(shape.attention(rope, window=window), mlp) for window in windows)

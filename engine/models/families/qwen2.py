"""Qwen 2 and 2.5: Llama's layers with a bias on q, k and v."""

from __future__ import annotations

from collections.abc import Mapping

from engine.models.families.common import Shape, read_activation, read_shape, read_windows
from engine.models.families.rope import read_rope
from engine.models.fields import Fields
from engine.models.spec import Dense, ModelSpec

# What an absent field means: Qwen2Config of transformers.
DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def read_spec(fields: Fields, renamed: Mapping[str, str] | None = None) -> ModelSpec:
    """renamed: see read_rope."""
    shape = read_shape(fields)
    rope, windows = read_rope(fields, shape, renamed=renamed), qwen_windows(fields, shape)
    mlp = Dense(shape.intermediate_size, read_activation(fields, "hidden_act"))
    return shape.model(shape.layer(shape.attention(rope, window=window, qkv_bias=True), mlp) for window in windows)


def qwen_windows(fields: Fields, shape: Shape) -> tuple[int | None, ...]:
    """A window counts only under `use_sliding_window`, and from layer `max_window_layers` on."""
    if not fields.flag("use_sliding_window"):
        return (None,) * shape.num_layers
    layer_types = fields.layer_types(shape.num_layers)
    if layer_types is None:
        first = fields.integer("max_window_layers", minimum=0)
        layer_types = tuple(
            "sliding_attention" if layer >= first else "full_attention" for layer in range(shape.num_layers)
        )
    return read_windows(fields, shape, layer_types)

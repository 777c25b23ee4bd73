"""Qwen 2 and 2.5: Llama's layers with a bias on q, k and v."""

from __future__ import annotations

from engine.models.config import ModelConfig, Shape, read_activation, read_rope, read_shape, read_windows
from engine.models.fields import Fields

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


def read_config(fields: Fields) -> ModelConfig:
    shape = read_shape(fields)
    return ModelConfig(
        **shape.common,
        rope=read_rope(fields, shape),
        attention_scale=shape.head_dim**-0.5,
        windows=qwen_windows(fields, shape),
        qkv_bias=True,
        activation=read_activation(fields, "hidden_act"),
    )


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

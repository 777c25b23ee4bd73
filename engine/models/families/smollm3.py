"""SmolLM3: Llama's layers, of which every fourth is not told positions."""

from __future__ import annotations

from engine.models.families.common import Shape, read_activation, read_shape, read_windows
from engine.models.families.rope import read_rope
from engine.models.fields import Fields
from engine.models.spec import Dense, ModelSpec

# What an absent field means: SmolLM3Config of transformers.
DEFAULTS = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-06,
    "eos_token_id": 128001,
    "tie_word_embeddings": True,
    "rope_theta": 2000000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "no_rope_layer_interval": 4,
}


def read_spec(fields: Fields) -> ModelSpec:
    """In `no_rope_layers` 1 means that the layer has a rope. Layers without one have the window, where there is one."""
    shape = read_shape(fields)
    bias = fields.flag("attention_bias")
    told = layers_with_rope(fields, shape)
    windows: tuple[int | None, ...] = (None,) * shape.num_layers
    if fields.flag("use_sliding_window"):
        layer_types = fields.layer_types(shape.num_layers) or tuple(
            "full_attention" if flag else "sliding_attention" for flag in told
        )
        windows = read_windows(fields, shape, layer_types)
    rope = read_rope(fields, shape)
    mlp = Dense(shape.intermediate_size, read_activation(fields, "hidden_act"), bias=fields.flag("mlp_bias"))
    return shape.model(
        shape.layer(shape.attention(rope if flag else None, window=window, qkv_bias=bias, output_bias=bias), mlp)
        for flag, window in zip(told, windows, strict=True)
    )


def layers_with_rope(fields: Fields, shape: Shape) -> list[int]:
    """1 for every layer that has one: `no_rope_layers`, else all but every `no_rope_layer_interval`th."""
    if not fields.has("no_rope_layers") or not fields.integers("no_rope_layers"):
        interval = fields.integer("no_rope_layer_interval")
        return [int((layer + 1) % interval != 0) for layer in range(shape.num_layers)]
    told = list(fields.integers("no_rope_layers"))
    if len(told) != shape.num_layers:
        fields.fail("no_rope_layers", f"must have num_hidden_layers = {shape.num_layers} entries, not {len(told)}")
    return told

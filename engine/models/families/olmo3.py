"""OLMo 3: OLMo 2 with windows in three of four layers, and a scaled rope in the others alone."""

from __future__ import annotations

from engine.models.families.common import read_activation, read_shape, read_windows
from engine.models.families.olmo2 import NORMS
from engine.models.families.rope import read_rope
from engine.models.fields import Fields
from engine.models.spec import Dense, ModelSpec

# What an absent field means: Olmo3Config of transformers.
DEFAULTS = {
    "vocab_size": 50304,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-05,
    "eos_token_id": 50279,
    "tie_word_embeddings": False,
    "rope_theta": 500000.0,
    "attention_bias": False,
    "sliding_window": 4096,
}


def read_spec(fields: Fields) -> ModelSpec:
    """Every fourth layer sees all, where `layer_types` says nothing."""
    shape = read_shape(fields)
    bias = fields.flag("attention_bias")
    layer_types = fields.layer_types(shape.num_layers) or tuple(
        "sliding_attention" if (layer + 1) % 4 else "full_attention" for layer in range(shape.num_layers)
    )
    ropes = {
        "full_attention": read_rope(fields, shape, layer_type="full_attention"),
        "sliding_attention": read_rope(fields, shape, layer_type="sliding_attention", scaled=False),
    }
    mlp = Dense(shape.intermediate_size, read_activation(fields, "hidden_act"))
    norms = {"norm_width": "full", **shape.qk_norms()}
    windows = read_windows(fields, shape, layer_types)
    return shape.model(
        shape.layer(shape.attention(ropes[kind], window=window, qkv_bias=bias, output_bias=bias, **norms), mlp, NORMS)
        for kind, window in zip(layer_types, windows, strict=True)
    )

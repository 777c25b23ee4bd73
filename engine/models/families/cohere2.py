"""Command R7B, Command A and Aya (Cohere 2): attention and MLP side by side, LayerNorm, no rope where all is seen."""

from __future__ import annotations

from engine.models.families.common import read_activation, read_shape, read_windows
from engine.models.families.rope import read_rope
from engine.models.fields import Fields
from engine.models.spec import Dense, ModelSpec

NORMS = ("input_layernorm", None, None, None)

# What an absent field means: Cohere2Config of transformers.
DEFAULTS = {
    "vocab_size": 256000,
    "hidden_size": 8192,
    "intermediate_size": 22528,
    "num_hidden_layers": 40,
    "num_attention_heads": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "layer_norm_eps": 1e-05,
    "eos_token_id": 255001,
    "tie_word_embeddings": True,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "sliding_window": 4096,
    "logit_scale": 0.0625,
}


def read_spec(fields: Fields) -> ModelSpec:
    """Every fourth layer sees all, where `layer_types` says nothing (`sliding_window_pattern` in older files)."""
    refuse_no_window(fields)
    shape = read_shape(fields, eps="layer_norm_eps", centered=True)
    bias = fields.flag("attention_bias")
    layer_types = fields.layer_types(shape.num_layers)
    if layer_types is None:
        period = fields.integer("sliding_window_pattern", 4)
        layer_types = tuple(
            "sliding_attention" if (layer + 1) % period else "full_attention" for layer in range(shape.num_layers)
        )
    rope = read_rope(fields, shape, interleaved=True)
    windows = read_windows(fields, shape, layer_types)
    mlp = Dense(shape.intermediate_size, read_activation(fields, "hidden_act"))
    return shape.model(
        (
            shape.layer(
                shape.attention(
                    rope if kind == "sliding_attention" else None, window=window, qkv_bias=bias, output_bias=bias
                ),
                mlp,
                NORMS,
                parallel=True,
            )
            for kind, window in zip(layer_types, windows, strict=True)
        ),
        logit_scale=fields.number("logit_scale", above=0.0),
    )


def refuse_no_window(fields: Fields) -> None:
    """Layers have a rope where they have a window: a null leaves open what they are."""
    if not fields.has("sliding_window"):
        fields.fail("sliding_window", "must be a number of tokens in this class, not null")

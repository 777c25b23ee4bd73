"""Gemma 2: norms before and after each block, soft caps, windows in every other layer, scaled embeddings."""

from __future__ import annotations

from typing import Any

from engine.models.config import (
    Fields,
    ModelConfig,
    Shape,
    WeightNames,
    read_activation,
    read_rope,
    read_shape,
    read_windows,
)

NAMES = WeightNames(
    attention_out_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_out_norm="post_feedforward_layernorm",
)


def read_config(fields: Fields) -> ModelConfig:
    """Even layers have the window where `layer_types` says nothing."""
    shape = read_shape(fields, head_dim=256, tie_word_embeddings=True)
    layer_types = fields.layer_types(shape.num_layers) or tuple(
        "full_attention" if layer % 2 else "sliding_attention" for layer in range(shape.num_layers)
    )
    return ModelConfig(
        **gemma_values(fields, shape, layer_types),
        rope=read_rope(fields, shape),
        attention_softcap=gemma_softcap(fields, "attn_logit_softcapping", 50.0),
        logit_softcap=gemma_softcap(fields, "final_logit_softcapping", 30.0),
    )


def gemma_values(fields: Fields, shape: Shape, layer_types: tuple[str, ...]) -> dict[str, Any]:
    """What Gemma 2 and 3 have in common, as arguments of ModelConfig."""
    if fields.flag("use_bidirectional_attention", False):
        fields.fail("use_bidirectional_attention", "is not supported")
    attention_bias = fields.flag("attention_bias", False)
    return shape.common | {
        "attention_scale": fields.number("query_pre_attn_scalar", 256, above=0.0) ** -0.5,
        "windows": read_windows(fields, shape, layer_types),
        "qkv_bias": attention_bias,
        "output_bias": attention_bias,
        "activation": read_activation(fields, "hidden_activation", "gelu_pytorch_tanh"),
        "norm_offset": 1.0,
        "embedding_scale": shape.hidden_size**0.5,
        "names": NAMES,
    }


def gemma_softcap(fields: Fields, name: str, default: float | None) -> float | None:
    """A soft cap: null means none, absent means the family's default."""
    return fields.optional_number(name, above=0.0) if fields.mentions(name) else default

"""Gemma 2: norms before and after each block, soft caps, windows in every other layer, scaled embeddings."""

from __future__ import annotations

from typing import Any

from engine.models.config import ModelConfig, Shape, WeightNames, read_activation, read_rope, read_shape, read_windows
from engine.models.fields import Fields

NAMES = WeightNames(
    attention_out_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_out_norm="post_feedforward_layernorm",
)


# What an absent field means: Gemma2Config of transformers.
DEFAULTS = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-06,
    "eos_token_id": 1,
    "tie_word_embeddings": True,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}


def read_config(fields: Fields) -> ModelConfig:
    """Even layers have the window where `layer_types` says nothing."""
    shape = read_shape(fields)
    layer_types = fields.layer_types(shape.num_layers) or tuple(
        "full_attention" if layer % 2 else "sliding_attention" for layer in range(shape.num_layers)
    )
    return ModelConfig(
        **gemma_values(fields, shape, layer_types),
        rope=read_rope(fields, shape),
        attention_softcap=fields.optional_number("attn_logit_softcapping", above=0.0),
        logit_softcap=fields.optional_number("final_logit_softcapping", above=0.0),
    )


def gemma_values(fields: Fields, shape: Shape, layer_types: tuple[str, ...]) -> dict[str, Any]:
    """What Gemma 2 and 3 have in common, as arguments of ModelConfig."""
    attention_bias = fields.flag("attention_bias")
    return shape.common | {
        "attention_scale": fields.number("query_pre_attn_scalar", above=0.0) ** -0.5,
        "windows": read_windows(fields, shape, layer_types),
        "qkv_bias": attention_bias,
        "output_bias": attention_bias,
        "activation": read_activation(fields, "hidden_activation"),
        "norm_offset": 1.0,
        "embedding_scale": shape.hidden_size**0.5,
        "names": NAMES,
    }

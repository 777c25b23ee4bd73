"""Gemma 2: norms before and after each block, soft caps, windows in every other layer, scaled embeddings."""

from __future__ import annotations

from typing import Any

from engine.models.families.common import Shape, read_activation, read_shape, read_windows
from engine.models.families.rope import read_rope
from engine.models.fields import Fields
from engine.models.mixers import GroupedQueryAttention, RopeSpec
from engine.models.spec import Dense, ModelSpec

NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
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


def read_spec(fields: Fields) -> ModelSpec:
    """Even layers have the window where `layer_types` says nothing."""
    shape = read_shape(fields, offset=1.0)
    layer_types = fields.layer_types(shape.num_layers) or tuple(
        "full_attention" if layer % 2 else "sliding_attention" for layer in range(shape.num_layers)
    )
    rope, windows = read_rope(fields, shape), read_windows(fields, shape, layer_types)
    softcap = fields.optional_number("attn_logit_softcapping", above=0.0)
    attention = [gemma_attention(fields, shape, rope, window, softcap=softcap) for window in windows]
    return gemma_model(fields, shape, attention)


def gemma_attention(
    fields: Fields, shape: Shape, rope: RopeSpec, window: int | None, **given: Any
) -> GroupedQueryAttention:
    """That of Gemma 2 and 3, but for the soft cap. given: fields of GroupedQueryAttention."""
    bias = fields.flag("attention_bias")
    return shape.attention(
        rope,
        scale=fields.number("query_pre_attn_scalar", above=0.0) ** -0.5,
        window=window,
        qkv_bias=bias,
        output_bias=bias,
        **given,
    )


def gemma_model(fields: Fields, shape: Shape, attention: list[GroupedQueryAttention]) -> ModelSpec:
    """A Gemma 2 or 3 of these attention layers."""
    mlp = Dense(shape.intermediate_size, read_activation(fields, "hidden_activation"))
    return shape.model(
        [shape.layer(each, mlp, NORMS) for each in attention],
        embedding_scale=shape.hidden_size**0.5,
        logit_softcap=fields.optional_number("final_logit_softcapping", above=0.0),
    )

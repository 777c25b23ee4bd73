"""Hunyuan dense (0.5B to 7B): norms on the heads of q and k after the rope."""

from __future__ import annotations

from dataclasses import replace

from engine.models.families.common import Shape, read_activation, read_shape
from engine.models.families.rope import read_rope
from engine.models.fields import Fields
from engine.models.mixers import GroupedQueryAttention, RopeSpec
from engine.models.spec import Dense, ModelSpec

# What an absent field means: HunYuanDenseV1Config of transformers.
DEFAULTS = {
    "vocab_size": 290943,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-05,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "attention_bias": False,
}


def read_spec(fields: Fields) -> ModelSpec:
    shape = read_shape(fields)
    mlp = Dense(shape.intermediate_size, read_activation(fields, "hidden_act"))
    return shape.model([shape.layer(hunyuan_attention(fields, shape), mlp)] * shape.num_layers)


def hunyuan_attention(fields: Fields, shape: Shape) -> GroupedQueryAttention:
    """That of the dense models and of those with experts."""
    bias = fields.flag("attention_bias")
    return shape.attention(
        _read_rope(fields, shape),
        qkv_bias=bias,
        output_bias=bias,
        q_norm=shape.norm("self_attn.query_layernorm"),
        k_norm=shape.norm("self_attn.key_layernorm"),
        norm_after_rope=True,
    )


def _read_rope(fields: Fields, shape: Shape) -> RopeSpec:
    """What the files call dynamic has a fixed `alpha`, by which the base alone is stretched."""
    scaling = fields.nested("rope_scaling") or fields.nested("rope_parameters") or fields.empty("rope_scaling")
    if not scaling.has("alpha") or "dynamic" not in (scaling.raw("rope_type"), scaling.raw("type")):
        return read_rope(fields, shape)
    alpha = scaling.number("alpha", above=0.0, maximum=1e9)
    rope = read_rope(fields, shape, renamed={"dynamic": "default"})
    if rope.rotary_dim < 4:
        fields.fail("head_dim", f"leaves {rope.rotary_dim} rotary dimensions; a rope with `alpha` needs at least 4")
    return replace(rope, theta=rope.theta * alpha ** (rope.rotary_dim / (rope.rotary_dim - 2)))

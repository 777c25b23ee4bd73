"""Granite with windows: Granite's factors, sinks, and a base of the rope for each layer."""

from __future__ import annotations

from dataclasses import replace

from engine.models.families import granite
from engine.models.families.common import Shape, read_activation, read_shape, read_windows
from engine.models.families.rope import read_rope
from engine.models.fields import Fields
from engine.models.mixers import GroupedQueryAttention, RopeSpec
from engine.models.spec import Dense, ModelSpec

# What an absent field means: GraniteSWAConfig of transformers.
DEFAULTS = {
    **granite.DEFAULTS,
    "vocab_size": 100352,
    "hidden_size": 2560,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-05,
    "eos_token_id": 100257,
    "tie_word_embeddings": True,
    "sliding_window": 128,
}


def read_spec(fields: Fields) -> ModelSpec:
    shape = read_shape(fields)
    mlp = Dense(shape.intermediate_size, read_activation(fields, "hidden_act"), bias=fields.flag("mlp_bias"))
    factor = fields.number("residual_multiplier", above=0.0)
    return shape.model(
        (shape.layer(each, mlp, residual_scale=factor) for each in read_attention(fields, shape)),
        **granite.granite_scales(fields),
    )


def read_attention(fields: Fields, shape: Shape) -> list[GroupedQueryAttention]:
    """Every fourth layer, the first one among them, sees all, where `layer_types` says nothing."""
    layer_types = fields.layer_types(shape.num_layers) or tuple(
        "sliding_attention" if layer % 4 else "full_attention" for layer in range(shape.num_layers)
    )
    bias = fields.flag("attention_bias")
    given = {"scale": fields.number("attention_multiplier", above=0.0), "sinks": "self_attn.sinks"}
    ropes = read_ropes(fields, shape, [True] * shape.num_layers)
    windows = read_windows(fields, shape, layer_types)
    return [
        shape.attention(rope, window=window, qkv_bias=bias, output_bias=bias, **given)
        for rope, window in zip(ropes, windows, strict=True)
    ]


def read_ropes(fields: Fields, shape: Shape, turns: list[bool]) -> list[RopeSpec | None]:
    """The rope of every layer: with the base of `layer_rope_theta` (0: none), else of those that turn."""
    rope = read_rope(fields, shape)
    given = fields.raw("layer_rope_theta")
    if given is None:
        return [rope if each else None for each in turns]
    if not isinstance(given, list) or len(given) != shape.num_layers:
        fields.fail("layer_rope_theta", f"must be a list of num_hidden_layers = {shape.num_layers} numbers")
    name = "layer_rope_theta"
    bases = [fields.with_values({name: base}).number(name, 0.0, minimum=0.0) for base in given]
    return [replace(rope, theta=base) if base else None for base in bases]

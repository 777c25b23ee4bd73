"""Falcon-H1: attention and Mamba 2 side by side in every layer, and a factor on nearly everything."""

from __future__ import annotations

from typing import Any

from engine.models.families.common import read_activation, read_shape
from engine.models.families.mamba import read_mamba
from engine.models.families.rope import read_rope
from engine.models.fields import Fields, show
from engine.models.mixers import NormSpec, SideBySide
from engine.models.spec import Dense, ModelSpec

# What an absent field means: FalconH1Config of transformers.
DEFAULTS = {
    "vocab_size": 128000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-05,
    "eos_token_id": 2,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "embedding_multiplier": 1.0,
    "attention_bias": False,
    "mlp_bias": False,
    "projectors_bias": False,
    "mamba_d_ssm": 1024,
    "mamba_n_heads": 128,
    "mamba_n_groups": 1,
    "mamba_d_state": 256,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
    "mamba_norm_before_gate": True,
    "mamba_rms_norm": False,
}
NORMS = ("input_layernorm", None, "pre_ff_layernorm", None)


def read_spec(fields: Fields) -> ModelSpec:
    """The factor on keys is part of the attention's scale, which comes to the same."""
    shape = read_shape(fields)
    bias = fields.flag("attention_bias")
    attention = shape.attention(
        read_rope(fields, shape),
        scale=shape.head_dim**-0.5 * _factor(fields, "key_multiplier"),
        qkv_bias=bias,
        output_bias=bias,
    )
    inner = fields.integer("mamba_d_ssm")
    if fields.mentions("mamba_d_ssm") and fields.raw("mamba_d_ssm") is None:
        inner = fields.integer("mamba_expand", maximum=64) * shape.hidden_size
    mamba = read_mamba(
        fields,
        inner,
        NormSpec("norm", shape.norms["eps"]) if fields.flag("mamba_rms_norm") else None,
        "hidden_act",
        norm_first=fields.flag("mamba_norm_before_gate"),
        output_bias=fields.flag("projectors_bias"),
        multipliers=_factors(fields, "ssm_multipliers", 5),
    )
    gate, down = _factors(fields, "mlp_multipliers", 2) or (1.0, 1.0)
    mlp = Dense(
        shape.intermediate_size,
        read_activation(fields, "hidden_act"),
        bias=fields.flag("mlp_bias"),
        gate_up=("feed_forward.gate_proj", "feed_forward.up_proj"),
        down="feed_forward.down_proj",
        gate_scale=gate,
        down_scale=down,
    )
    mixer = SideBySide(
        (mamba, attention),
        (_factor(fields, "ssm_in_multiplier"), _factor(fields, "attention_in_multiplier")),
        (_factor(fields, "ssm_out_multiplier"), _factor(fields, "attention_out_multiplier")),
    )
    return shape.model(
        [shape.layer(mixer, mlp, NORMS)] * shape.num_layers,
        final_norm=shape.norm("final_layernorm"),
        embedding_scale=_factor(fields, "embedding_multiplier"),
        logit_scale=_factor(fields, "lm_head_multiplier"),
    )


def _factor(fields: Fields, name: str) -> float:
    return fields.number(name, 1.0)


def _factors(fields: Fields, name: str, count: int) -> tuple[float, ...] | None:
    """A list of `count` numbers, or None where it is absent."""
    value: Any = fields.raw(name)
    if value is None:
        return None
    right = isinstance(value, list) and len(value) == count
    if not right or any(isinstance(item, bool) or not isinstance(item, int | float) for item in value):
        fields.fail(name, f"must be a list of {count} numbers, not {show(value)}")
    return tuple(float(item) for item in value)

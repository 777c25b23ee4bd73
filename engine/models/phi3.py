"""Phi-3 and Phi-4: Llama's layers, with the projections already fused in the checkpoint, and longrope."""

from __future__ import annotations

from engine.models.config import Fields, ModelConfig, WeightNames, read_activation, read_rope, read_shape, read_windows

NAMES = WeightNames(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",))


def read_config(fields: Fields) -> ModelConfig:
    """Early releases call longrope "su" or "yarn"."""
    shape = read_shape(fields)
    return ModelConfig(
        **shape.common,
        rope=read_rope(fields, shape, renamed={"su": "longrope", "yarn": "longrope"}),
        attention_scale=shape.head_dim**-0.5,
        windows=read_windows(fields, shape, ("sliding_attention",) * shape.num_layers, default=None),
        activation=read_activation(fields, "hidden_act", "silu"),
        names=NAMES,
    )

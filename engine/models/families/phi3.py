"""Phi-3 and Phi-4: Llama's layers, with the projections already fused in the checkpoint, and longrope."""

from __future__ import annotations

from engine.models.families.common import read_activation, read_shape, read_windows
from engine.models.families.rope import read_rope
from engine.models.fields import Fields
from engine.models.spec import Dense, ModelSpec

# What an absent field means: Phi3Config of transformers.
DEFAULTS = {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "eos_token_id": 32000,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
}


def read_spec(fields: Fields) -> ModelSpec:
    """Early releases call longrope "su" or "yarn"."""
    shape = read_shape(fields)
    rope = read_rope(fields, shape, renamed={"su": "longrope", "yarn": "longrope"})
    windows = read_windows(fields, shape, ("sliding_attention",) * shape.num_layers)
    mlp = Dense(shape.intermediate_size, read_activation(fields, "hidden_act"), gate_up=("mlp.gate_up_proj",))
    return shape.model(
        shape.layer(shape.attention(rope, window=window, qkv=("self_attn.qkv_proj",)), mlp) for window in windows
    )

"""Command R (Cohere): attention and MLP side by side, LayerNorm, interleaved rope, logits by a factor."""

from __future__ import annotations

from typing import Any

from engine.models.families.cohere2 import NORMS
from engine.models.families.common import read_activation, read_shape
from engine.models.families.rope import read_rope
from engine.models.fields import Fields
from engine.models.spec import Dense, ModelSpec

# What an absent field means: CohereConfig of transformers.
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
    "rope_theta": 500000.0,
    "attention_bias": False,
    "logit_scale": 0.0625,
    "use_qk_norm": False,
}


def read_spec(fields: Fields) -> ModelSpec:
    """`use_qk_norm` (Command R+) means norms with a weight of its own for every head."""
    shape = read_shape(fields, eps="layer_norm_eps", centered=True)
    norms: dict[str, Any] = {**shape.qk_norms(), "norm_width": "own"} if fields.flag("use_qk_norm") else {}
    bias = fields.flag("attention_bias")
    rope = read_rope(fields, shape, interleaved=True)
    attention = shape.attention(rope, qkv_bias=bias, output_bias=bias, **norms)
    mlp = Dense(shape.intermediate_size, read_activation(fields, "hidden_act"))
    layer = shape.layer(attention, mlp, NORMS, parallel=True)
    return shape.model([layer] * shape.num_layers, logit_scale=fields.number("logit_scale", above=0.0))

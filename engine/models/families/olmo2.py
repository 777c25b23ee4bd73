"""OLMo 2: norms only after attention and MLP, and norms on q and k over all heads at once."""

from __future__ import annotations

from engine.models.families.common import read_activation, read_shape
from engine.models.families.rope import read_rope
from engine.models.fields import Fields
from engine.models.spec import Dense, ModelSpec

NORMS = (None, "post_attention_layernorm", None, "post_feedforward_layernorm")

# What an absent field means: Olmo2Config of transformers.
DEFAULTS = {
    "vocab_size": 50304,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-05,
    "eos_token_id": 50279,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "attention_bias": False,
}


def read_spec(fields: Fields) -> ModelSpec:
    shape = read_shape(fields)
    bias = fields.flag("attention_bias")
    attention = shape.attention(
        read_rope(fields, shape), qkv_bias=bias, output_bias=bias, norm_width="full", **shape.qk_norms()
    )
    mlp = Dense(shape.intermediate_size, read_activation(fields, "hidden_act"))
    return shape.model([shape.layer(attention, mlp, NORMS)] * shape.num_layers)

"""Apertus: norms on the heads of q and k, and an MLP without a gate whose activation is learned (xIELU)."""

from __future__ import annotations

from engine.models.families.common import read_shape
from engine.models.families.rope import read_rope
from engine.models.fields import Fields
from engine.models.spec import ModelSpec, Ungated

NORMS = ("attention_layernorm", None, "feedforward_layernorm", None)

# What an absent field means: ApertusConfig of transformers.
DEFAULTS = {
    "vocab_size": 131072,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "xielu",
    "max_position_embeddings": 65536,
    "rms_norm_eps": 1e-05,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "rope_theta": 12000000.0,
    "attention_bias": False,
}
# The class's own rope, where the file says nothing of it.
ROPE = {
    "rope_type": "llama3",
    "rope_theta": 12000000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}


def read_spec(fields: Fields) -> ModelSpec:
    shape = read_shape(fields)
    fields.choice("hidden_act", ("xielu",))
    bias = fields.flag("attention_bias")
    given = fields
    if not fields.has("rope_parameters") and not fields.has("rope_scaling"):
        given = fields.with_values({"rope_parameters": ROPE})
    attention = shape.attention(read_rope(given, shape), qkv_bias=bias, output_bias=bias, **shape.qk_norms())
    mlp = Ungated(shape.intermediate_size, "xielu")
    return shape.model([shape.layer(attention, mlp, NORMS)] * shape.num_layers)

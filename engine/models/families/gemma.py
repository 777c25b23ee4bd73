"""Gemma 1: Llama's layers with scaled embeddings, and norms whose weights stand for 1 + weight."""

from __future__ import annotations

from engine.models.families.common import read_activation, read_shape
from engine.models.families.rope import read_rope
from engine.models.fields import Fields
from engine.models.spec import Dense, ModelSpec

# What an absent field means: GemmaConfig of transformers.
DEFAULTS = {
    "vocab_size": 256000,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-06,
    "eos_token_id": 1,
    "tie_word_embeddings": True,
    "rope_theta": 10000.0,
    "attention_bias": False,
}


def read_spec(fields: Fields) -> ModelSpec:
    """The first files say "gelu" and mean its tanh form, which `hidden_activation` of later ones names."""
    shape = read_shape(fields, offset=1.0)
    bias = fields.flag("attention_bias")
    attention = shape.attention(read_rope(fields, shape), qkv_bias=bias, output_bias=bias)
    name = "hidden_activation" if fields.has("hidden_activation") else "hidden_act"
    activation = read_activation(fields, name, {"gelu": "gelu_tanh"})
    layer = shape.layer(attention, Dense(shape.intermediate_size, activation))
    return shape.model([layer] * shape.num_layers, embedding_scale=shape.hidden_size**0.5)

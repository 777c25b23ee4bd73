"""Phi-1, 1.5 and 2: attention and MLP side by side, LayerNorm, biases everywhere, half a rope."""

from __future__ import annotations

from engine.models.families.cohere2 import NORMS
from engine.models.families.common import read_plain_activation, read_shape
from engine.models.families.rope import read_rope
from engine.models.fields import Fields
from engine.models.spec import ModelSpec, Ungated

# What an absent field means: PhiConfig of transformers.
DEFAULTS = {
    "vocab_size": 51200,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "hidden_act": "gelu_new",
    "max_position_embeddings": 2048,
    "layer_norm_eps": 1e-05,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "qk_layernorm": False,
}


def read_spec(fields: Fields) -> ModelSpec:
    shape = read_shape(fields, eps="layer_norm_eps", centered=True, bias=True)
    if fields.flag("qk_layernorm"):
        fields.fail("qk_layernorm", "is not supported")
    if fields.flag("tie_word_embeddings"):
        fields.fail("tie_word_embeddings", "is not supported: the output layer has a bias")
    attention = shape.attention(read_rope(fields, shape), qkv_bias=True, output_bias=True, output="self_attn.dense")
    activation = read_plain_activation(fields, "hidden_act")
    mlp = Ungated(shape.intermediate_size, activation, bias=True, up="mlp.fc1", down="mlp.fc2")
    layer = shape.layer(attention, mlp, NORMS, parallel=True)
    return shape.model([layer] * shape.num_layers, final_norm=shape.norm("final_layernorm"), head_bias=True)

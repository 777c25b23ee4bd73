"""The text part of Qwen3-VL with experts: those of a layer are one tensor, and weights always add up to 1."""

from __future__ import annotations

from engine.models.families.common import read_activation, read_experts, read_shape
from engine.models.families.qwen2_vl import MROPE
from engine.models.families.qwen3_moe import sparse_layers
from engine.models.families.rope import read_rope
from engine.models.fields import Fields
from engine.models.spec import Dense, Experts, ModelSpec, Router

# What an absent field means: Qwen3VLMoeTextConfig of transformers; whether it is tied, the outer class says.
DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 128000,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "rope_theta": 500000.0,
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 1408,
    "num_experts_per_tok": 4,
    "num_experts": 60,
}


def read_spec(fields: Fields) -> ModelSpec:
    """On the hub the tensors of experts are transposed, as transformers saves them they are not."""
    shape = read_shape(fields)
    bias = fields.flag("attention_bias")
    rope = read_rope(fields, shape, renamed=MROPE)
    attention = shape.attention(rope, qkv_bias=bias, output_bias=bias, **shape.qk_norms())
    num_experts, num_experts_per_token = read_experts(fields, "num_experts", "num_local_experts")
    activation = read_activation(fields, "hidden_act")
    experts = Experts(
        num_experts,
        num_experts_per_token,
        fields.integer("moe_intermediate_size"),
        activation,
        Router(normalize=True),
        gate_up=("mlp.experts.{}.gate_up_proj",),
        stacked="columns",
    )
    mlp = Dense(shape.intermediate_size, activation)
    return shape.model(shape.layer(attention, experts if sparse else mlp) for sparse in sparse_layers(fields, shape))

"""A.X K1: DeepSeek V3 with a norm behind the experts."""

from __future__ import annotations

from dataclasses import replace

from engine.models.families import deepseek_v3
from engine.models.families.glm4_moe import sigmoid_layers, sparse_by_type
from engine.models.families.latent import read_latent, refuse_other_routing
from engine.models.fields import Fields
from engine.models.spec import Experts, ModelSpec

# What an absent field means: AXK1Config of transformers.
DEFAULTS = {
    **{
        name: value
        for name, value in deepseek_v3.DEFAULTS.items()
        if name not in ("first_k_dense_replace", "num_mtp_layers")
    },
    "vocab_size": 163840,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "n_routed_experts": 192,
    "max_position_embeddings": 32768,
    "eos_token_id": 163691,
}


def read_spec(fields: Fields) -> ModelSpec:
    """Layers are dense as `mlp_layer_types` says, else as `first_k_dense_replace` does, which is 1."""
    refuse_other_routing(fields, {"scoring_func": "sigmoid", "moe_layer_freq": 1})
    shape, attention = read_latent(fields)
    sparse = sparse_by_type(fields, shape.num_layers)
    layers = sigmoid_layers(fields, shape, [attention] * shape.num_layers, sparse)
    norm = shape.norm("post_mlp_layernorm")
    return shape.model(
        replace(layer, feed_forward_out_norm=norm) if isinstance(layer.feed_forward, Experts) else layer
        for layer in layers
    )

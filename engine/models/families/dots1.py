"""dots.llm1: Qwen 3's attention, experts as in DeepSeek V3."""

from __future__ import annotations

from engine.models.families.common import read_shape, read_windows
from engine.models.families.glm4_moe import sigmoid_layers
from engine.models.families.rope import read_rope
from engine.models.fields import Fields
from engine.models.spec import ModelSpec

# What an absent field means: Dots1Config of transformers.
DEFAULTS = {
    "vocab_size": 152064,
    "hidden_size": 4608,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 62,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "norm_topk_prob": False,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "routed_scaling_factor": 1.0,
    "sliding_window": 4096,
    "max_window_layers": 62,
}


def read_spec(fields: Fields) -> ModelSpec:
    """Layers from `max_window_layers` on have the window, where `layer_types` says nothing."""
    shape = read_shape(fields)
    bias = fields.flag("attention_bias")
    rope = read_rope(fields, shape)
    layer_types = fields.layer_types(shape.num_layers)
    if layer_types is None:
        first = fields.integer("max_window_layers", minimum=0)
        layer_types = tuple(
            "sliding_attention" if layer >= first else "full_attention" for layer in range(shape.num_layers)
        )
    attention = [
        shape.attention(rope, window=window, qkv_bias=bias, output_bias=bias, **shape.qk_norms())
        for window in read_windows(fields, shape, layer_types)
    ]
    return shape.model(sigmoid_layers(fields, shape, attention))

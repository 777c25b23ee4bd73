"""Gemma 3, text only: Gemma 2's layers with norms on q and k, and another rope in the layers with a window."""

from __future__ import annotations

from engine.models.families.common import read_shape, read_windows
from engine.models.families.gemma2 import gemma_attention, gemma_model
from engine.models.families.rope import read_rope
from engine.models.fields import Fields
from engine.models.spec import ModelSpec

# What an absent field means: Gemma3TextConfig of transformers.
DEFAULTS = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-06,
    "eos_token_id": 1,
    "tie_word_embeddings": True,
    "rope_theta": 1e6,
    "rope_local_base_freq": 10000.0,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
}


def read_spec(fields: Fields) -> ModelSpec:
    """Every sixth layer (`sliding_window_pattern`) sees all, where `layer_types` says nothing.

    attn_logit_softcapping is a field of the class that its attention does not read.
    """
    shape = read_shape(fields, offset=1.0)
    layer_types = fields.layer_types(shape.num_layers)
    if layer_types is None:
        pattern = fields.integer("sliding_window_pattern")
        layer_types = tuple(
            "sliding_attention" if (layer + 1) % pattern else "full_attention" for layer in range(shape.num_layers)
        )
    ropes = {
        "full_attention": read_rope(fields, shape, layer_type="full_attention"),
        "sliding_attention": read_rope(
            fields, shape, theta_field="rope_local_base_freq", layer_type="sliding_attention", scaled=False
        ),
    }
    windows = read_windows(fields, shape, layer_types)
    attention = [
        gemma_attention(fields, shape, ropes[kind], window, **shape.qk_norms())
        for kind, window in zip(layer_types, windows, strict=True)
    ]
    return gemma_model(fields, shape, attention)

"""Gemma 3, text only: Gemma 2's layers with norms on q and k, and another rope in the layers with a window."""

from __future__ import annotations

from engine.models.config import Fields, ModelConfig, read_rope, read_shape
from engine.models.gemma2 import gemma_softcap, gemma_values


def read_config(fields: Fields) -> ModelConfig:
    """Every sixth layer (`sliding_window_pattern`) sees all, where `layer_types` says nothing."""
    shape = read_shape(fields, head_dim=256, tie_word_embeddings=True)
    layer_types = fields.layer_types(shape.num_layers)
    if layer_types is None:
        pattern = fields.integer("sliding_window_pattern", 6)
        layer_types = tuple(
            "sliding_attention" if (layer + 1) % pattern else "full_attention" for layer in range(shape.num_layers)
        )
    return ModelConfig(
        **gemma_values(fields, shape, layer_types),
        qk_norm="head",
        rope=read_rope(fields, shape, theta=1e6, layer_type="full_attention"),
        local_rope=read_rope(
            fields, shape, theta_field="rope_local_base_freq", layer_type="sliding_attention", scaled=False
        ),
        local_rope_layers=tuple(kind == "sliding_attention" for kind in layer_types),
        attention_softcap=gemma_softcap(fields, "attn_logit_softcapping", None),
        logit_softcap=gemma_softcap(fields, "final_logit_softcapping", None),
    )

"""MiniCPM 1 to 4: Llama with factors on embeddings, on what a layer adds, and on logits."""

from __future__ import annotations

import math
from dataclasses import replace

from engine.models.families import llama
from engine.models.fields import Fields
from engine.models.spec import ModelSpec, share

# What an absent field means in its own code: transformers has no such class.
DEFAULTS = {**llama.DEFAULTS, "tie_word_embeddings": True, "scale_emb": 1, "scale_depth": 1, "dim_model_base": 1}


def read_spec(fields: Fields) -> ModelSpec:
    """`sparse_config` (MiniCPM 4.1) makes attention to long texts sparse, which is not supported."""
    if fields.raw("sparse_config"):
        fields.fail("sparse_config", "is not supported: with null in its place attention is to all tokens")
    if fields.has("num_experts") and fields.integer("num_experts", minimum=0):
        fields.fail("num_experts", "is not supported in this class")
    spec = llama.read_spec(fields)
    factor = fields.number("scale_depth", above=0.0) / math.sqrt(spec.num_layers)
    return replace(
        spec,
        layers=share(replace(layer, residual_scale=factor) for layer in spec.layers),
        embedding_scale=fields.number("scale_emb", above=0.0),
        logit_scale=fields.number("dim_model_base", above=0.0) / spec.hidden_size,
    )

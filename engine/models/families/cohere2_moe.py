"""Cohere 2 with experts (North Mini): attention and experts side by side, one norm for both."""

from __future__ import annotations

import dataclasses

from engine.models.families import cohere2
from engine.models.families.common import read_activation, read_experts, read_shape, read_windows, shared_experts
from engine.models.families.glm4_moe import sparse_by_type
from engine.models.families.rope import read_rope
from engine.models.fields import Fields
from engine.models.spec import Dense, Experts, ModelSpec, Router

# What an absent field means: Cohere2MoeConfig of transformers.
DEFAULTS = {
    **cohere2.DEFAULTS,
    "head_dim": 128,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_shared_experts": 0,
    "shared_expert_combination_strategy": "average",
    "expert_selection_fn": "softmax",
    "norm_topk_prob": True,
    "sliding_window_pattern": 4,
    "prefix_dense_sliding_window_pattern": 1,
}


def read_spec(fields: Fields) -> ModelSpec:
    """Dense layers come first, with a pattern of windows of their own; where that is 1, they have a rope in any case.

    An RMS norm takes LayerNorm's place where the file has its epsilon.
    """
    cohere2.refuse_no_window(fields)
    rms = fields.has("rms_norm_eps")
    shape = read_shape(fields, eps="rms_norm_eps") if rms else read_shape(fields, eps="layer_norm_eps", centered=True)
    given = fields if fields.has("first_k_dense_replace") else fields.with_values({"first_k_dense_replace": 0})
    sparse = sparse_by_type(given, shape.num_layers)
    before = fields.integer("prefix_dense_sliding_window_pattern")
    layer_types = fields.layer_types(shape.num_layers)
    if layer_types is None:
        first, period = given.integer("first_k_dense_replace", minimum=0), fields.integer("sliding_window_pattern")
        places = [
            (layer + 1) % before if layer < first else (layer - first + 1) % period for layer in range(shape.num_layers)
        ]
        layer_types = tuple("sliding_attention" if place else "full_attention" for place in places)
    rope, windows = read_rope(fields, shape, interleaved=True), read_windows(fields, shape, layer_types)
    bias = fields.flag("attention_bias")
    experts, mlp = _read_experts(fields, shape.intermediate_size), None
    if not all(sparse):
        mlp = Dense(fields.integer("prefix_dense_intermediate_size"), experts.activation)  # type: ignore[arg-type]
    layers = []
    for each, kind, window in zip(sparse, layer_types, windows, strict=True):
        turns = kind == "sliding_attention" or (not each and before == 1)
        attention = shape.attention(rope if turns else None, window=window, qkv_bias=bias, output_bias=bias)
        forward = experts if each or mlp is None else mlp
        layers.append(shape.layer(attention, forward, cohere2.NORMS, parallel=True))
    return shape.model(layers, logit_scale=fields.number("logit_scale", above=0.0))


def _read_experts(fields: Fields, inner: int) -> Experts:
    """The best logits are chosen; shares are a softmax of those alone, or sigmoids."""
    count, chosen = read_experts(fields, "num_experts", "num_local_experts")
    activation = read_activation(fields, "hidden_act")
    score = fields.choice("expert_selection_fn", ("softmax", "sigmoid"))
    router = Router(
        score == "softmax" or fields.flag("norm_topk_prob"), score="sigmoid" if score != "softmax" else "softmax"
    )
    shared = shared_experts("shared_experts", inner * fields.integer("num_shared_experts", minimum=0), activation)
    strategy = fields.choice("shared_expert_combination_strategy", ("average", "sum"))
    if shared is not None and strategy == "average":
        router, shared = dataclasses.replace(router, scale=0.5), dataclasses.replace(shared, down_scale=0.5)
    return Experts(count, chosen, inner, activation, router, shared=shared)

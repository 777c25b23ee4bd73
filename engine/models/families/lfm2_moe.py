"""LFM2 with experts: LFM2's layers, the first few with an MLP, all others with experts of sigmoid scores."""

from __future__ import annotations

from engine.models.families import lfm2
from engine.models.families.common import read_experts, read_shape
from engine.models.fields import Fields
from engine.models.spec import Dense, Experts, ModelSpec, Router

# What an absent field means: Lfm2MoeConfig of transformers.
DEFAULTS = {
    **lfm2.COMMON,
    "hidden_size": 2048,
    "intermediate_size": 7168,
    "moe_intermediate_size": 1792,
    "num_dense_layers": 2,
    "num_experts_per_tok": 4,
    "num_experts": 32,
    "use_expert_bias": True,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": True,
}


def read_spec(fields: Fields) -> ModelSpec:
    fields = lfm2.renamed(fields, {"tie_embedding": "tie_word_embeddings"})
    shape = read_shape(fields, eps="norm_eps")
    mlp = Dense(shape.intermediate_size, "silu", gate_up=("feed_forward.w1", "feed_forward.w3"), down="feed_forward.w2")
    count, chosen = read_experts(fields, "num_experts", "num_local_experts")
    experts = Experts(
        count,
        chosen,
        fields.integer("moe_intermediate_size"),
        "silu",
        Router(
            fields.flag("norm_topk_prob"),
            name="feed_forward.gate",
            score="sigmoid",
            bias="feed_forward.expert_bias" if fields.flag("use_expert_bias") else None,
            scale=fields.number("routed_scaling_factor", above=0.0),
        ),
        gate_up=("feed_forward.experts.{}.w1", "feed_forward.experts.{}.w3"),
        down="feed_forward.experts.{}.w2",
    )
    dense = fields.integer("num_dense_layers", minimum=0)
    feed_forwards = [mlp if layer < dense else experts for layer in range(shape.num_layers)]
    layers = lfm2.short_conv_layers(fields, shape, fields.words("layer_types"), feed_forwards)
    return shape.model(layers, final_norm=shape.norm("embedding_norm"))

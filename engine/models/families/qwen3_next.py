"""Qwen3-Next: gated delta nets in three layers of four, gated attention in the fourth, and a mixture of experts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from engine.models.families.common import Shape, read_activation, read_experts, read_shape, shared_experts
from engine.models.families.qwen3_moe import sparse_layers
from engine.models.families.rope import read_rope
from engine.models.fields import Fields, show
from engine.models.mixers import GatedDelta, NormSpec
from engine.models.spec import Dense, Experts, FeedForward, LayerSpec, ModelSpec, Router

# What absent fields mean in this class of transformers and in those of Qwen 3.5.
COMMON = {
    "num_attention_heads": 16,
    "head_dim": 256,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.25,
    "attention_bias": False,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}
# ModelSpec.outside: the layer that drafts, which the files have whatever config.json says.
DRAFTING = ("mtp.layers.0.",)
# What an absent field means: Qwen3NextConfig of transformers.
DEFAULTS = {
    **COMMON,
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 48,
    "num_key_value_heads": 2,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "num_experts_per_tok": 10,
    "num_experts": 512,
    "norm_topk_prob": True,
}


def read_spec(fields: Fields) -> ModelSpec:
    shape = read_shape(fields, offset=1.0)
    experts = gated_experts(fields, normalize=fields.flag("norm_topk_prob"))
    mlp = Dense(shape.intermediate_size, read_activation(fields, "hidden_act"))
    feed_forwards = [experts if sparse else mlp for sparse in sparse_layers(fields, shape)]
    return shape.model(hybrid_layers(fields, shape, feed_forwards, ("in_proj_qkvz", "in_proj_ba")), outside=DRAFTING)


def gated_experts(fields: Fields, *, normalize: bool) -> Experts:
    """Experts, and one that all tokens share by a gate. All of a layer may stand in one tensor."""
    num_experts, num_experts_per_token = read_experts(fields, "num_experts", "num_local_experts")
    activation = read_activation(fields, "hidden_act")
    return Experts(
        num_experts,
        num_experts_per_token,
        fields.integer("moe_intermediate_size"),
        activation,
        Router(normalize),
        stacked="rows",
        fused="mlp.experts.gate_up_proj",
        shared=shared_experts("shared_expert", fields.integer("shared_expert_intermediate_size"), activation),
        shared_gate="mlp.shared_expert_gate",
    )


def hybrid_layers(
    fields: Fields,
    shape: Shape,
    feed_forwards: Iterable[FeedForward],
    projections: tuple[str, ...],
    renamed: Mapping[str, str] | None = None,
) -> list[LayerSpec]:
    """Layers with linear_attention are gated delta nets; every `full_attention_interval`-th sees all where
    `layer_types` says nothing. projections: see GatedDelta. renamed: see read_rope."""
    fields.choice("hidden_act", ("silu", "swish"))
    if fields.has("attn_output_gate") and not fields.flag("attn_output_gate"):
        fields.fail("attn_output_gate", "is false: attention without its gate is not supported")
    kinds = fields.words("layer_types")
    if not kinds:
        interval = fields.integer("full_attention_interval", 4)
        kinds = tuple("linear_attention" if (i + 1) % interval else "full_attention" for i in range(shape.num_layers))
    if len(kinds) != shape.num_layers:
        fields.fail("layer_types", f"must be a list of num_hidden_layers = {shape.num_layers} entries")
    for kind in kinds:
        if kind not in ("linear_attention", "full_attention"):
            fields.fail("layer_types", f"must hold linear_attention or full_attention, not {show(kind)}")
    bias = fields.flag("attention_bias")
    rope = read_rope(fields, shape, renamed=renamed)
    attention = shape.attention(rope, qkv_bias=bias, output_bias=bias, gated_queries=True, **shape.qk_norms())
    delta = read_delta(fields, NormSpec("norm", shape.norms["eps"]), projections)
    return [
        shape.layer(delta if kind == "linear_attention" else attention, feed_forward)
        for kind, feed_forward in zip(kinds, feed_forwards, strict=True)
    ]


def read_delta(fields: Fields, norm: NormSpec, projections: tuple[str, ...]) -> GatedDelta:
    """The sizes of a gated delta net. Raises StartupError."""
    key_heads, heads = fields.integer("linear_num_key_heads"), fields.integer("linear_num_value_heads")
    if heads % key_heads:
        fields.fail("linear_num_key_heads", f"({key_heads}) must divide linear_num_value_heads ({heads})")
    return GatedDelta(
        key_heads,
        heads,
        fields.integer("linear_key_head_dim", maximum=4096),
        fields.integer("linear_value_head_dim", maximum=4096),
        fields.integer("linear_conv_kernel_dim", minimum=2, maximum=64),
        norm,
        projections,
    )

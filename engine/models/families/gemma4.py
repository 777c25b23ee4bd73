"""Gemma 4: two head sizes, layers that read the keys and values of earlier ones, inputs of a layer's own, experts
beside a dense feed-forward."""

from __future__ import annotations

from dataclasses import replace

from engine.models.families.common import Shape, read_activation, read_shape, read_windows
from engine.models.families.gemma2 import NORMS
from engine.models.families.rope import read_rope
from engine.models.fields import Fields
from engine.models.mixers import GroupedQueryAttention, NormSpec, RopeSpec
from engine.models.spec import Dense, DenseAndExperts, Experts, FeedForward, LayerInput, LayerSpec, ModelSpec, Router

# What an absent field means: Gemma4TextConfig of transformers.
DEFAULTS = {
    "vocab_size": 262144,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-06,
    "eos_token_id": 1,
    "tie_word_embeddings": True,
    "rope_theta": 1e6,
    "attention_bias": False,
    "sliding_window": 512,
    "vocab_size_per_layer_input": 262144,
    "hidden_size_per_layer_input": 256,
    "attention_k_eq_v": False,
    "num_kv_shared_layers": 0,
    "enable_moe_block": False,
    "use_double_wide_mlp": False,
}
# Not of the class's dataclass, but read by it.
GLOBAL_HEAD_DIM = 512
ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}


def read_spec(fields: Fields) -> ModelSpec:
    """Every sixth layer sees all, where `layer_types` says nothing, and the last one always."""
    if fields.raw("use_bidirectional_attention") == "all":
        fields.fail("use_bidirectional_attention", "(all) is not supported")
    shape = read_shape(fields)
    types = fields.layer_types(shape.num_layers) or tuple(
        "sliding_attention" if (layer + 1) % 6 else "full_attention" for layer in range(shape.num_layers)
    )
    types = (*types[:-1], "full_attention")
    if not fields.raw("rope_parameters"):
        fields = fields.with_values({"rope_parameters": ROPES})
    reads = read_shared(fields, types)
    windows = read_windows(fields, shape, types)
    activation = read_activation(fields, "hidden_activation")
    ropes: dict[tuple[str, int], RopeSpec] = {}
    layers = []
    for index, kind in enumerate(types):
        head_dim, kv_heads = _read_sizes(fields, shape, kind, index)
        sizes = replace(shape, head_dim=head_dim, num_kv_heads=kv_heads)
        if (kind, head_dim) not in ropes:
            ropes[kind, head_dim] = read_rope(fields, sizes, layer_type=kind)
        attention = _attention(fields, sizes, ropes[kind, head_dim], windows[index], kind, reads[index])
        wide = 2 if fields.flag("use_double_wide_mlp") and reads[index] is not None else 1
        dense = Dense(wide * shape.intermediate_size, activation)
        layers.append(_layer(fields, shape, attention, dense))
    size = fields.integer("hidden_size_per_layer_input", minimum=0)
    own = None
    if size:
        own = LayerInput(
            size,
            fields.integer("vocab_size_per_layer_input"),
            activation,
            shape.norm("post_per_layer_input_norm"),
            shape.norm("per_layer_projection_norm"),
        )
        if own.vocab_size < shape.common["vocab_size"]:
            fields.fail("vocab_size_per_layer_input", f"({own.vocab_size}) must not be below vocab_size")
    return shape.model(
        layers,
        embedding_scale=shape.hidden_size**0.5,
        logit_softcap=fields.optional_number("final_logit_softcapping", above=0.0),
        layer_input=own,
        outside=unread_projections(reads),
    )


def unread_projections(reads: list[int | None]) -> tuple[str, ...]:
    """ModelSpec.outside: files have projections of layers that read the keys and values of others."""
    names = ("k_proj", "v_proj", "k_norm", "v_norm")
    readers = [index for index, each in enumerate(reads) if each is not None]
    return tuple(f"layers.{index}.self_attn.{name}." for index in readers for name in names)


def read_shared(fields: Fields, types: tuple[str, ...]) -> list[int | None]:
    """For each of the last `num_kv_shared_layers` layers the last earlier one of its type."""
    count = len(types)
    shared = fields.integer("num_kv_shared_layers", minimum=0)
    if shared >= count:
        fields.fail("num_kv_shared_layers", f"({shared}) must be below num_hidden_layers ({count})")
    own = types[: count - shared]
    for kind in types:
        if kind not in own:
            fields.fail("num_kv_shared_layers", f"({shared}) leaves no layer with {kind} to read from")
    last = {kind: index for index, kind in enumerate(own)}
    return [None if index < len(own) else last[kind] for index, kind in enumerate(types)]


def _read_sizes(fields: Fields, shape: Shape, kind: str, index: int) -> tuple[int, int]:
    """head_dim and key and value heads of a layer: newer files have them by its number, older ones those of all that
    see everything."""
    by_layer = fields.nested("per_layer_config")
    if by_layer is not None:
        own = by_layer.nested(str(index)) or by_layer.empty(str(index))
        unknown = own.names() - {"head_dim", "num_key_value_heads"}
        if unknown:
            own.fail(min(unknown), "is not supported: head_dim and num_key_value_heads of a layer are")
        head_dim = own.integer("head_dim", shape.head_dim)
        kv_heads = own.integer("num_key_value_heads", shape.num_kv_heads)
    elif kind == "full_attention":
        head_dim = fields.integer("global_head_dim", GLOBAL_HEAD_DIM)
        kv_heads = shape.num_kv_heads
        if fields.flag("attention_k_eq_v"):
            kv_heads = fields.integer("num_global_key_value_heads", kv_heads)
    else:
        return shape.head_dim, shape.num_kv_heads
    if shape.num_heads % kv_heads:
        fields.fail("num_attention_heads", f"({shape.num_heads}) must be a multiple of a layer's {kv_heads} KV heads")
    return head_dim, kv_heads


def _attention(
    fields: Fields, shape: Shape, rope: RopeSpec, window: int | None, kind: str, reads: int | None
) -> GroupedQueryAttention:
    bias = fields.flag("attention_bias")
    same = fields.flag("attention_k_eq_v") and kind == "full_attention"
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    return shape.attention(
        rope,
        scale=1.0,
        window=window,
        qkv_bias=bias,
        output_bias=bias,
        reads=reads,
        v_norm=NormSpec("self_attn.v_norm", shape.norms["eps"], weightless=True),
        values_of_keys=same,
        qkv=names[:1] if reads is not None else names[:2] if same else names,
        **shape.qk_norms(),
    )


def _layer(fields: Fields, shape: Shape, attention: GroupedQueryAttention, dense: Dense) -> LayerSpec:
    if not fields.flag("enable_moe_block"):
        return shape.layer(attention, dense, NORMS, end_scale="layer_scalar")
    count = fields.integer("num_experts", maximum=100_000)
    chosen = fields.integer("top_k_experts")
    if chosen > count:
        fields.fail("top_k_experts", f"({chosen}) must not exceed num_experts ({count})")
    router = Router(
        normalize=True,
        name="router.proj",
        input_scale="router.scale",
        input_eps=shape.norms["eps"],
        expert_scale="router.per_expert_scale",
    )
    experts = Experts(
        count,
        chosen,
        fields.integer("moe_intermediate_size"),
        dense.activation,
        router,
        gate_up=("experts.{}.gate_up_proj",),
        down="experts.{}.down_proj",
        stacked="rows",
    )
    names = (
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm_1",
        "pre_feedforward_layernorm_2",
        "post_feedforward_layernorm_2",
    )
    both: FeedForward = DenseAndExperts(dense, experts, *map(shape.norm, names))
    norms = (NORMS[0], NORMS[1], None, NORMS[3])
    return shape.layer(attention, both, norms, end_scale="layer_scalar")

"""MiMo V2 Flash: layers with a window have twice the key and value heads and sinks; values of another size, scaled."""

from __future__ import annotations

from engine.models.families.common import Shape, read_shape, read_windows
from engine.models.families.glm4_moe import sigmoid_layers, sparse_by_type
from engine.models.families.latent import refuse_other_routing
from engine.models.families.rope import read_rope
from engine.models.fields import Fields
from engine.models.spec import ModelSpec

# What an absent field means: MiMoV2FlashConfig of transformers.
DEFAULTS = {
    "vocab_size": 152576,
    "hidden_size": 4096,
    "intermediate_size": 16384,
    "num_hidden_layers": 48,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 192,
    "v_head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "sliding_window": 129,
    "attention_value_scale": 0.707,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
}
# Bases of the two ropes, and what turns of a head.
ROPES = {"full_attention": ("rope_theta", 5_000_000.0), "sliding_attention": ("swa_rope_theta", 10_000.0)}
PARTIAL = 0.334


def read_spec(fields: Fields) -> ModelSpec:
    """The first layer and every sixth see all, where `layer_types`, or the hub's `hybrid_layer_pattern`, says nothing.

    The hub's `sliding_window_size` is one token shorter than a window, for it leaves the query out.
    """
    if fields.has("sliding_window_size"):
        fields = fields.with_values({"sliding_window": fields.integer("sliding_window_size") + 1})
    shape = read_shape(fields)
    layer_types = fields.layer_types(shape.num_layers) or _older_types(fields, shape)
    wide = 2 * shape.num_kv_heads
    if "sliding_attention" in layer_types and shape.num_heads % wide:
        fields.fail("num_key_value_heads", f"({shape.num_kv_heads}), doubled, must divide num_attention_heads")
    value_dim, bias = fields.integer("v_head_dim"), fields.flag("attention_bias")
    known = {
        "swa_num_attention_heads": shape.num_heads,
        "swa_num_key_value_heads": wide,
        "swa_head_dim": shape.head_dim,
        "swa_v_head_dim": value_dim,
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    }
    refuse_other_routing(fields, known)
    if not fields.raw("rope_parameters"):
        partial = fields.number("partial_rotary_factor", PARTIAL, above=0.0, maximum=1.0)
        bases = {kind: fields.number(name, base, above=0.0) for kind, (name, base) in ROPES.items()}
        given = {kind: {"rope_theta": base, "partial_rotary_factor": partial} for kind, base in bases.items()}
        fields = fields.with_values({"rope_parameters": given})
    ropes = {kind: read_rope(fields, shape, layer_type=kind) for kind in dict.fromkeys(layer_types)}
    scale = fields.number("attention_value_scale", above=0.0) if fields.has("attention_value_scale") else 1.0
    local = {"num_kv_heads": wide, "sinks": "self_attn.attention_sink_bias"}
    attention = [
        shape.attention(
            ropes[kind],
            window=window,
            qkv_bias=bias,
            value_dim=value_dim,
            value_scale=scale,
            **(local if kind == "sliding_attention" else {}),
        )
        for kind, window in zip(layer_types, read_windows(fields, shape, layer_types), strict=True)
    ]
    layers = sigmoid_layers(fields, shape, attention, _read_sparse(fields, shape), shared=None)
    return shape.model(layers, outside=("mtp.",))


def _older_types(fields: Fields, shape: Shape) -> tuple[str, ...]:
    """The pattern has a 1 for a window."""
    pattern = _by_layer(fields, shape, "hybrid_layer_pattern") or tuple(
        int(layer > 0 and (layer + 1) % 6 != 0) for layer in range(shape.num_layers)
    )
    return tuple("sliding_attention" if each else "full_attention" for each in pattern)


def _read_sparse(fields: Fields, shape: Shape) -> list[bool]:
    """The hub's `moe_layer_freq` has a 1 for experts."""
    listed = isinstance(fields.raw("moe_layer_freq"), list) and not fields.has("mlp_layer_types")
    pattern = _by_layer(fields, shape, "moe_layer_freq") if listed else ()
    return [each == 1 for each in pattern] or sparse_by_type(fields, shape.num_layers)


def _by_layer(fields: Fields, shape: Shape, name: str) -> tuple[int, ...]:
    """A 0 or a 1 for every layer, empty where the field is absent."""
    pattern = fields.integers(name)
    if pattern and (len(pattern) != shape.num_layers or not set(pattern) <= {0, 1}):
        fields.fail(name, f"must hold 0 or 1 for each of num_hidden_layers = {shape.num_layers} layers")
    return pattern

"""MiMo V2 Flash: layers with a window have twice the key and value heads and sinks; values of another size, scaled."""

from __future__ import annotations

from engine.models.families.common import read_shape, read_windows
from engine.models.families.glm4_moe import sigmoid_layers, sparse_by_type
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
ROPES = {
    "full_attention": {"rope_type": "default", "rope_theta": 5_000_000.0, "partial_rotary_factor": 0.334},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.334},
}


def read_spec(fields: Fields) -> ModelSpec:
    """The first layer and every sixth see all, where `layer_types` says nothing. `sliding_window_size` is one token
    shorter than a window, for it leaves the query out."""
    if fields.has("sliding_window_size"):
        fields = fields.with_values({"sliding_window": fields.integer("sliding_window_size") + 1})
    shape = read_shape(fields)
    if not fields.raw("rope_parameters"):
        fields = fields.with_values({"rope_parameters": ROPES})
    layer_types = fields.layer_types(shape.num_layers) or tuple(
        "sliding_attention" if layer and (layer + 1) % 6 else "full_attention" for layer in range(shape.num_layers)
    )
    wide = 2 * shape.num_kv_heads
    if "sliding_attention" in layer_types and shape.num_heads % wide:
        fields.fail("num_key_value_heads", f"({shape.num_kv_heads}), doubled, must divide num_attention_heads")
    given = {
        "qkv_bias": fields.flag("attention_bias"),
        "value_dim": fields.integer("v_head_dim"),
        "value_scale": fields.number("attention_value_scale", above=0.0)
        if fields.has("attention_value_scale")
        else 1.0,
    }
    ropes = {kind: read_rope(fields, shape, layer_type=kind) for kind in dict.fromkeys(layer_types)}
    local = {"num_kv_heads": wide, "sinks": "self_attn.attention_sink_bias"}
    attention = [
        shape.attention(ropes[kind], window=window, **given, **(local if kind == "sliding_attention" else {}))
        for kind, window in zip(layer_types, read_windows(fields, shape, layer_types), strict=True)
    ]
    layers = sigmoid_layers(fields, shape, attention, sparse_by_type(fields, shape.num_layers), shared=None)
    return shape.model(layers, outside=("mtp.",))

"""LFM2: short convolutions in most layers, attention with a norm on every head of q and k in the others."""

from __future__ import annotations

from collections.abc import Sequence

from engine.models.families.common import Shape, read_shape
from engine.models.families.rope import read_rope
from engine.models.fields import Fields, show
from engine.models.mixers import ShortConv
from engine.models.spec import Dense, FeedForward, LayerSpec, ModelSpec

# What absent fields mean in this class of transformers and in that with experts.
COMMON = {
    "vocab_size": 65536,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 128000,
    "norm_eps": 1e-05,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
    "rope_theta": 1000000.0,
    "conv_bias": False,
    "conv_L_cache": 3,
}
# What an absent field means: Lfm2Config of transformers.
DEFAULTS = {
    **COMMON,
    "hidden_size": 2560,
    "intermediate_size": 12288,
    "block_multiple_of": 256,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": True,
}
NORMS = ("operator_norm", None, "ffn_norm", None)


def read_spec(fields: Fields) -> ModelSpec:
    """Where `layer_types` says nothing, `full_attn_idxs` are the layers with attention, and all of them without it."""
    fields = renamed(fields, {"tie_embedding": "tie_word_embeddings", "block_ff_dim": "intermediate_size"})
    shape = read_shape(fields, eps="norm_eps")
    kinds = fields.words("layer_types")
    if not kinds:
        attending = fields.integers("full_attn_idxs") if fields.has("full_attn_idxs") else range(shape.num_layers)
        kinds = tuple("full_attention" if layer in attending else "conv" for layer in range(shape.num_layers))
    mlp = Dense(
        _inner_size(fields, shape), "silu", gate_up=("feed_forward.w1", "feed_forward.w3"), down="feed_forward.w2"
    )
    layers = short_conv_layers(fields, shape, kinds, [mlp] * shape.num_layers)
    return shape.model(layers, final_norm=shape.norm("embedding_norm"))


def renamed(fields: Fields, names: dict[str, str]) -> Fields:
    """The fields where the older names in the file count in place of the newer."""
    return fields.with_values({new: fields.raw(old) for old, new in names.items() if fields.mentions(old)})


def short_conv_layers(
    fields: Fields, shape: Shape, kinds: Sequence[str], feed_forwards: Sequence[FeedForward]
) -> list[LayerSpec]:
    """Layers of kind conv or full_attention. Raises StartupError."""
    if len(kinds) != shape.num_layers:
        fields.fail("layer_types", f"must be a list of num_hidden_layers = {shape.num_layers} entries")
    for kind in kinds:
        if kind not in ("conv", "full_attention"):
            fields.fail("layer_types", f"must hold conv or full_attention, not {show(kind)}")
    attention = shape.attention(
        read_rope(fields, shape),
        q_norm=shape.norm("self_attn.q_layernorm"),
        k_norm=shape.norm("self_attn.k_layernorm"),
        output="self_attn.out_proj",
    )
    taps = fields.integer("conv_L_cache", minimum=2, maximum=64)
    conv = ShortConv(shape.hidden_size, taps, fields.flag("conv_bias"))
    return [
        shape.layer(conv if kind == "conv" else attention, feed_forward, NORMS)
        for kind, feed_forward in zip(kinds, feed_forwards, strict=True)
    ]


def _inner_size(fields: Fields, shape: Shape) -> int:
    if not fields.flag("block_auto_adjust_ff_dim"):
        return shape.intermediate_size
    factor, multiple = fields.number("block_ffn_dim_multiplier", above=0.0), fields.integer("block_multiple_of")
    size = int(factor * int(2 * shape.intermediate_size / 3))
    return -(-size // multiple) * multiple

"""Llama 4: layers with a rope see a block of the text, the others all of it; one expert a token beside a shared one."""

from __future__ import annotations

from collections.abc import Collection

from engine.groups import Chunk
from engine.models.families.common import Shape, read_activation, read_experts, read_shape
from engine.models.families.rope import read_rope
from engine.models.families.smollm3 import layers_with_rope
from engine.models.fields import Fields, show
from engine.models.mixers import NormSpec, QueryScale
from engine.models.spec import Dense, Experts, ModelSpec, Router

# What an absent field means: Llama4TextConfig of transformers.
DEFAULTS = {
    "vocab_size": 202048,
    "hidden_size": 5120,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "rope_theta": 500000.0,
    "num_experts_per_tok": 1,
    "num_local_experts": 16,
    "interleave_moe_layer_step": 1,
    "use_qk_norm": True,
    "no_rope_layer_interval": 4,
    "attention_chunk_size": 8192,
    "attn_temperature_tuning": True,
    "floor_scale": 8192,
    "attn_scale": 0.1,
    "attention_bias": False,
}


def read_spec(fields: Fields) -> ModelSpec:
    """Layers without a rope have queries that grow with the position, the others norms on what they turned."""
    shape = read_shape(fields)
    rope, bias = read_rope(fields, shape, interleaved=True), fields.flag("attention_bias")
    norms = {}
    if fields.flag("use_qk_norm"):
        name = "self_attn.qk_norm"
        norm = NormSpec(name, shape.norms["eps"], weightless=True)
        norms = {"q_norm": norm, "k_norm": norm, "norm_after_rope": True}
    turning = {"rope": rope, **norms}
    still = {"rope": None, "query_scale": _read_query_scale(fields)}
    windows, sparse = _read_windows(fields, shape), _read_sparse(fields, shape)
    experts, mlp = _read_feed_forwards(fields, shape)
    return shape.model(
        shape.layer(
            shape.attention(**(turning if told else still), window=window, qkv_bias=bias, output_bias=bias),
            experts if index in sparse else mlp,
        )
        for index, (told, window) in enumerate(zip(layers_with_rope(fields, shape), windows, strict=True))
    )


def _read_query_scale(fields: Fields) -> QueryScale | None:
    """The switch is a number in some files."""
    switch = fields.raw("attn_temperature_tuning")
    if switch is not None and type(switch) not in (bool, int):
        fields.fail("attn_temperature_tuning", f"must be true or false, not {show(switch)}")
    if switch is not None and not switch:
        return None
    return QueryScale(fields.number("attn_scale", minimum=0.0), fields.integer("floor_scale"), offset=1)


def _read_windows(fields: Fields, shape: Shape) -> list[int | None]:
    """Blocks in the layers whose type says so, else in those with a rope; none as long as the context."""
    size = fields.integer("attention_chunk_size") if fields.has("attention_chunk_size") else None
    kinds = fields.layer_types(shape.num_layers, ("full_attention", "chunked_attention"))
    chunked = [kind == "chunked_attention" for kind in kinds or ()]
    if kinds is None:
        chunked = [size is not None and bool(told) for told in layers_with_rope(fields, shape)]
    if size is None and any(chunked):
        fields.fail("attention_chunk_size", "is missing, and layer_types has chunked_attention")
    whole = size is None or size >= shape.max_position_embeddings
    return [None if whole or not each or size is None else Chunk(size) for each in chunked]


def _read_sparse(fields: Fields, shape: Shape) -> Collection[int]:
    """Layers with experts: `moe_layers`, else every `interleave_moe_layer_step`th."""
    if fields.has("moe_layers"):
        return set(fields.integers("moe_layers"))
    step = fields.integer("interleave_moe_layer_step")
    return range(step - 1, shape.num_layers, step)


def _read_feed_forwards(fields: Fields, shape: Shape) -> tuple[Experts, Dense]:
    activation = read_activation(fields, "hidden_act")
    count, chosen = read_experts(fields, "num_local_experts", "num_experts")
    shared = Dense(
        shape.intermediate_size,
        activation,
        gate_up=("feed_forward.shared_expert.gate_proj", "feed_forward.shared_expert.up_proj"),
        down="feed_forward.shared_expert.down_proj",
    )
    experts = Experts(
        count,
        chosen,
        shape.intermediate_size,
        activation,
        Router(normalize=False, name="feed_forward.router", score="sigmoid"),
        gate_up=("feed_forward.experts.{}.gate_up_proj",),
        down="feed_forward.experts.{}.down_proj",
        stacked="columns",
        shared=shared,
        on_input=True,
    )
    mlp = Dense(
        fields.integer("intermediate_size_mlp"),
        activation,
        gate_up=("feed_forward.gate_proj", "feed_forward.up_proj"),
        down="feed_forward.down_proj",
    )
    return experts, mlp

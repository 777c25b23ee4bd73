"""Gemma 3n: Gemma 4's shared keys and values and own inputs of layers, in several streams (AltUp) that each layer
predicts and corrects, with a low-rank path beside attention (LAuReL) and gates of few values."""

from __future__ import annotations

from engine.models.families.common import Shape, read_activation, read_shape, read_windows
from engine.models.families.gemma2 import NORMS
from engine.models.families.gemma4 import read_shared, unread_projections
from engine.models.families.rope import read_rope
from engine.models.fields import Fields
from engine.models.mixers import NormSpec
from engine.models.spec import Dense, LayerInput, ModelSpec, Streams

# What an absent field means: Gemma3nTextConfig of transformers.
DEFAULTS = {
    "vocab_size": 262400,
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "num_hidden_layers": 35,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-06,
    "eos_token_id": 1,
    "tie_word_embeddings": True,
    "rope_theta": 1e6,
    "rope_local_base_freq": 10000.0,
    "attention_bias": False,
    "sliding_window": 512,
    "final_logit_softcapping": 30.0,
    "vocab_size_per_layer_input": 262144,
    "hidden_size_per_layer_input": 256,
    "altup_active_idx": 0,
    "altup_correct_scale": True,
    "altup_num_inputs": 4,
    "num_kv_shared_layers": 15,
    "laurel_rank": 64,
}
# Where the file does not say how sparse gates are: so many layers of a deeper model, this share of their values.
SPARSE_LAYERS, SPARSITY = 10, 0.95


def read_spec(fields: Fields) -> ModelSpec:
    """Every fifth layer sees all, where `layer_types` says nothing."""
    inner = _read_inner(fields)
    shape = read_shape(fields.with_values({"intermediate_size": inner[0]} if inner else {}))
    inner = inner or (shape.intermediate_size,) * shape.num_layers
    if len(inner) != shape.num_layers:
        fields.fail("intermediate_size", f"must be a list of num_hidden_layers = {shape.num_layers} integers")
    types = fields.layer_types(shape.num_layers) or tuple(
        "sliding_attention" if (layer + 1) % 5 else "full_attention" for layer in range(shape.num_layers)
    )
    ropes = {
        "full_attention": read_rope(fields, shape, layer_type="full_attention"),
        "sliding_attention": read_rope(
            fields, shape, theta_field="rope_local_base_freq", layer_type="sliding_attention", scaled=False
        ),
    }
    reads, windows = read_shared(fields, types), read_windows(fields, shape, types)
    activation, bias = read_activation(fields, "hidden_activation"), fields.flag("attention_bias")
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    sparsity = _read_sparsity(fields, shape)
    layers = []
    for index, kind in enumerate(types):
        attention = shape.attention(
            ropes[kind],
            scale=1.0,
            window=windows[index],
            qkv_bias=bias,
            output_bias=bias,
            reads=reads[index],
            v_norm=NormSpec("self_attn.v_norm", shape.norms["eps"], weightless=True),
            qkv=names if reads[index] is None else names[:1],
            **shape.qk_norms(),
        )
        layers.append(shape.layer(attention, Dense(inner[index], activation, sparsity=sparsity[index]), NORMS))
    count = fields.integer("altup_num_inputs", maximum=64)
    active = fields.integer("altup_active_idx", minimum=0)
    if active >= count:
        fields.fail("altup_active_idx", f"({active}) must be below altup_num_inputs ({count})")
    return shape.model(
        layers,
        embedding_scale=shape.hidden_size**0.5,
        logit_softcap=fields.optional_number("final_logit_softcapping", above=0.0),
        layer_input=LayerInput(
            fields.integer("hidden_size_per_layer_input"),
            fields.integer("vocab_size_per_layer_input"),
            activation,
            shape.norm("post_per_layer_input_norm"),
            shape.norm("per_layer_projection_norm"),
        ),
        streams=Streams(
            count,
            active,
            fields.integer("laurel_rank"),
            shape.norm("altup.router_norm"),
            shape.norm("laurel.post_laurel_norm"),
            fields.flag("altup_correct_scale"),
        ),
        outside=unread_projections(reads),
    )


def _read_inner(fields: Fields) -> tuple[int, ...]:
    """`intermediate_size` of every layer where it is a list of them, as transformers writes it; else empty."""
    given = fields.raw("intermediate_size")
    if not isinstance(given, list):
        return ()
    sizes = fields.integers("intermediate_size")
    if not sizes or min(sizes) < 1:
        fields.fail("intermediate_size", "must hold one integer above 0 for every layer")
    return sizes


def _read_sparsity(fields: Fields, shape: Shape) -> tuple[float, ...]:
    """The share of a gate's values that count as 0, of every layer."""
    given, name = fields.raw("activation_sparsity_pattern"), "activation_sparsity_pattern"
    if given is None:
        sparse = SPARSE_LAYERS if shape.num_layers > SPARSE_LAYERS else 0
        return (SPARSITY,) * sparse + (0.0,) * (shape.num_layers - sparse)
    if not isinstance(given, list) or len(given) != shape.num_layers:
        fields.fail(name, f"must be a list of num_hidden_layers = {shape.num_layers} numbers")
    for each in given:
        if not isinstance(each, int | float) or isinstance(each, bool) or not 0 <= each < 1:
            fields.fail(name, "must hold numbers from 0 to below 1")
    return tuple(float(each) for each in given)

"""The text part of Muse Glimmer: gated attention, a rope in layers with a window alone, a normed embedding."""

from __future__ import annotations

from engine.models.families.common import read_activation, read_shape, read_windows
from engine.models.families.gemma2 import NORMS
from engine.models.families.rope import read_rope
from engine.models.fields import Fields
from engine.models.mixers import NormSpec, OutputGate
from engine.models.spec import Dense, Embedding, LayerSpec, ModelSpec

# What an absent field means: MuseGlimmerTextConfig of transformers.
DEFAULTS = {
    "vocab_size": 202048,
    "hidden_size": 6656,
    "intermediate_size": 19968,
    "num_hidden_layers": 52,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "hidden_activation": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "eos_token_id": 200001,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "sliding_window": 2048,
    "final_logit_softcapping": 20.0,
    "qk_scale_factor": 3.87,
    "output_multiplier": 0.19611613513818404,
    "post_norm_eps": 1e-08,
}


def read_spec(fields: Fields) -> ModelSpec:
    """Every fourth layer, counted from the last, sees all and has no rope, where the file says nothing.

    In `layer_rope_theta` 0 is no rope. Any other number must be the one base that transformers uses for all layers.
    """
    shape = read_shape(fields, offset=1.0)
    whole = [(shape.num_layers - 1 - layer) % 4 == 0 for layer in range(shape.num_layers)]
    layer_types = fields.layer_types(shape.num_layers) or tuple(
        "full_attention" if each else "sliding_attention" for each in whole
    )
    rope, windows = read_rope(fields, shape), read_windows(fields, shape, layer_types)
    turns, bases = [not each for each in whole], fields.raw("layer_rope_theta")
    if bases is not None:
        known = isinstance(bases, list) and all(base in (0, rope.theta) for base in bases)
        if not known or len(bases) != shape.num_layers:
            fields.fail("layer_rope_theta", f"must hold 0 or {rope.theta:g} for each of {shape.num_layers} layers")
        turns = [base != 0 for base in bases]
    eps, post_eps = shape.norms["eps"], fields.number("post_norm_eps", minimum=0.0, maximum=1.0)
    norm = NormSpec("self_attn.qk_norm", eps, weightless=True)
    bias = fields.flag("attention_bias")
    mlp = Dense(shape.intermediate_size, read_activation(fields, "hidden_activation"))
    layers = []
    for window, turned in zip(windows, turns, strict=True):
        attention = shape.attention(
            rope if turned else None,
            # Queries are multiplied by the factor after their norm.
            scale=shape.head_dim**-0.5 * fields.number("qk_scale_factor", above=0.0),
            window=window,
            qkv_bias=bias,
            output_bias=bias,
            q_norm=norm,
            k_norm=norm,
            gate=OutputGate("self_attn.gate_proj", "sigmoid"),
        )
        before, after = shape.norm(NORMS[0]), shape.norm(NORMS[2])
        mixer_out, forward_out = (NormSpec(name, post_eps, offset=1.0) for name in (NORMS[1], NORMS[3]))
        layers.append(LayerSpec(attention, mlp, before, mixer_out, after, forward_out))
    return shape.model(
        layers,
        final_norm=NormSpec("norm", eps),
        embedding=Embedding(norm=NormSpec("embed_norm", eps, weightless=True)),
        logit_scale=fields.number("output_multiplier", above=0.0),
        logit_softcap=fields.optional_number("final_logit_softcapping", above=0.0),
    )

"""EXAONE 4: norms after attention and MLP, on q and k too; layers that see all are not told positions."""

from __future__ import annotations

from engine.models.families.common import Shape, read_activation, read_shape, read_windows
from engine.models.families.olmo2 import NORMS
from engine.models.families.rope import read_rope
from engine.models.fields import Fields
from engine.models.mixers import GroupedQueryAttention
from engine.models.spec import Dense, ModelSpec

# What an absent field means: Exaone4Config of transformers.
DEFAULTS = {
    "vocab_size": 102400,
    "hidden_size": 4096,
    "intermediate_size": 16384,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-05,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "sliding_window_pattern": 4,
}


def read_spec(fields: Fields) -> ModelSpec:
    shape = read_shape(fields)
    mlp = Dense(shape.intermediate_size, read_activation(fields, "hidden_act"))
    return shape.model(shape.layer(each, mlp, NORMS) for each in read_attention(fields, shape))


def read_attention(fields: Fields, shape: Shape) -> list[GroupedQueryAttention]:
    """Every fourth layer sees all, where `layer_types` says nothing; without a window every layer has a rope.

    The pattern is a number, or a word of Ls (window) and Gs that repeats.
    """
    windowed = fields.has("sliding_window")
    layer_types = fields.layer_types(shape.num_layers)
    if layer_types is None:
        pattern = fields.raw("sliding_window_pattern")
        if isinstance(pattern, str) and pattern and set(pattern) <= {"L", "G"}:
            local = [pattern[layer % len(pattern)] == "L" for layer in range(shape.num_layers)]
        else:
            period = fields.integer("sliding_window_pattern")
            local = [(layer + 1) % period != 0 for layer in range(shape.num_layers)]
        layer_types = tuple("sliding_attention" if windowed and flag else "full_attention" for flag in local)
    rope = read_rope(fields, shape)
    windows = read_windows(fields, shape, layer_types)
    return [
        shape.attention(
            rope if not windowed or kind == "sliding_attention" else None, window=window, **shape.qk_norms()
        )
        for kind, window in zip(layer_types, windows, strict=True)
    ]

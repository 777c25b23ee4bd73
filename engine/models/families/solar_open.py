"""Solar Open: GLM-4.5's experts in every layer, with a rope over whole heads."""

from __future__ import annotations

from engine.models.families import glm4_moe
from engine.models.families.common import read_shape
from engine.models.families.rope import read_rope
from engine.models.fields import Fields
from engine.models.spec import ModelSpec

_ABSENT = ("first_k_dense_replace", "intermediate_size", "partial_rotary_factor", "use_qk_norm")
# What an absent field means: SolarOpenConfig of transformers.
DEFAULTS = {
    **{name: value for name, value in glm4_moe.DEFAULTS.items() if name not in _ABSENT},
    "vocab_size": 196608,
    "num_hidden_layers": 48,
    "num_attention_heads": 64,
    "head_dim": 128,
    "rope_theta": 1e6,
    "moe_intermediate_size": 1280,
}


def read_spec(fields: Fields) -> ModelSpec:
    """attention_bias covers q, k and v but not o. No layer is without experts, so intermediate_size is of nothing."""
    shape = read_shape(fields.with_values({"intermediate_size": fields.integer("moe_intermediate_size")}))
    attention = shape.attention(read_rope(fields, shape), qkv_bias=fields.flag("attention_bias"))
    layers = glm4_moe.sigmoid_layers(fields, shape, [attention] * shape.num_layers, [True] * shape.num_layers)
    return shape.model(layers)

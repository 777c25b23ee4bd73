"""FlexOlmo: OLMoE's experts with OLMo 2's norms, after attention and experts."""

from __future__ import annotations

from engine.models.families import olmoe
from engine.models.families.common import read_activation, read_experts, read_shape
from engine.models.families.olmo2 import NORMS
from engine.models.families.rope import read_rope
from engine.models.fields import Fields
from engine.models.spec import Experts, ModelSpec, Router

# What an absent field means: FlexOlmoConfig of transformers.
DEFAULTS = {
    **olmoe.DEFAULTS,
    "vocab_size": 100352,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-06,
    "eos_token_id": 100257,
    "rope_theta": 500000.0,
    "num_experts_per_tok": 5,
    "num_experts": 7,
}


def read_spec(fields: Fields) -> ModelSpec:
    shape = read_shape(fields)
    bias = fields.flag("attention_bias")
    attention = shape.attention(
        read_rope(fields, shape), qkv_bias=bias, output_bias=bias, norm_width="full", **shape.qk_norms()
    )
    count, chosen = read_experts(fields, "num_experts", "num_local_experts")
    activation = read_activation(fields, "hidden_act")
    experts = Experts(count, chosen, shape.intermediate_size, activation, Router(fields.flag("norm_topk_prob")))
    return shape.model([shape.layer(attention, experts, NORMS)] * shape.num_layers)

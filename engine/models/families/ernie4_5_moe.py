"""ERNIE 4.5 with experts: interleaved rope, a softmax router with a bias for the choice, shared experts."""

from __future__ import annotations

from engine.models.families.common import aliased, read_activation, read_shape, shared_experts
from engine.models.families.rope import read_rope
from engine.models.fields import Fields
from engine.models.spec import Dense, Experts, ModelSpec, Router

# What an absent field means: Ernie4_5_MoeConfig of transformers.
DEFAULTS = {
    "vocab_size": 103424,
    "hidden_size": 2560,
    "intermediate_size": 12288,
    "num_hidden_layers": 28,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
    "rope_theta": 500000.0,
    "use_bias": False,
    "moe_intermediate_size": 1536,
    "moe_k": 6,
    "moe_num_experts": 64,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": -1,
    "moe_layer_interval": 1,
    "moe_norm_min": 1e-12,
}


def read_spec(fields: Fields) -> ModelSpec:
    """Layers from `moe_layer_start_index` to `moe_layer_end_index` have experts, every `moe_layer_interval`th one."""
    fields = aliased(aliased(fields, "moe_num_experts", "num_experts"), "moe_k", "num_experts_per_tok")
    shape = read_shape(fields)
    bias = fields.flag("use_bias")
    attention = shape.attention(read_rope(fields, shape, interleaved=True), qkv_bias=bias, output_bias=bias)
    activation = read_activation(fields, "hidden_act")
    if bias:
        fields.fail("use_bias", "is not supported in a model with experts")
    count = fields.integer("moe_num_experts", maximum=100_000)
    chosen = fields.integer("moe_k", maximum=count)
    inner = fields.integer("moe_intermediate_size")
    experts = Experts(
        count,
        chosen,
        inner,
        activation,
        Router(
            normalize=True,
            bias="mlp.moe_statics.e_score_correction_bias",
            bias_is_row=True,
            wide=True,
            minimum=fields.number("moe_norm_min", above=0.0),
        ),
        shared=shared_experts(
            "shared_experts", inner * fields.integer("moe_num_shared_experts", minimum=0), activation
        ),
    )
    mlp = Dense(shape.intermediate_size, activation)
    first = fields.integer("moe_layer_start_index", minimum=0)
    last = fields.integer("moe_layer_end_index", minimum=-1)
    last = shape.num_layers - 1 if last == -1 else last
    step = fields.integer("moe_layer_interval")
    layers = (
        shape.layer(attention, experts if (index + 1) % step == 0 and first <= index <= last else mlp)
        for index in range(shape.num_layers)
    )
    # Layers that guess several tokens at once, which are not run.
    return shape.model(layers, outside=("mtp_",))

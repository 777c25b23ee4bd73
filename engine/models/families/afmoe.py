"""AFMoE (Trinity): gated attention, ropes in layers with a window alone, norms on both sides, sigmoid experts."""

from __future__ import annotations

from engine.models.families.common import read_activation, read_experts, read_shape, read_windows, shared_experts
from engine.models.families.latent import refuse_other_routing
from engine.models.families.rope import read_rope
from engine.models.fields import Fields
from engine.models.mixers import OutputGate
from engine.models.spec import Dense, Experts, ModelSpec, Router

# What an absent field means: AfmoeConfig of transformers.
DEFAULTS = {
    "vocab_size": 200192,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "sliding_window": 1024,
    "global_attn_every_n_layers": 4,
    "num_dense_layers": 1,
    "num_experts": 64,
    "num_experts_per_tok": 6,
    "num_shared_experts": 2,
    "moe_intermediate_size": 1408,
    "route_scale": 1.0,
    "mup_enabled": False,
}
NORMS = ("input_layernorm", "post_attention_layernorm", "pre_mlp_layernorm", "post_mlp_layernorm")


def read_spec(fields: Fields) -> ModelSpec:
    """Every `global_attn_every_n_layers`-th layer sees all, where `layer_types` says nothing."""
    refuse_other_routing(fields, {"score_func": "sigmoid", "route_norm": True, "n_group": 1, "num_expert_groups": 1})
    shape = read_shape(fields)
    layer_types = fields.layer_types(shape.num_layers)
    if layer_types is None:
        period = fields.integer("global_attn_every_n_layers")
        layer_types = tuple(
            "sliding_attention" if (layer + 1) % period else "full_attention" for layer in range(shape.num_layers)
        )
    rope, windows = read_rope(fields, shape), read_windows(fields, shape, layer_types)
    bias, gate = fields.flag("attention_bias"), OutputGate("self_attn.gate_proj", "sigmoid")
    activation = read_activation(fields, "hidden_act")
    count, chosen = read_experts(fields, "num_experts", "num_local_experts")
    inner = fields.integer("moe_intermediate_size")
    experts = Experts(
        count,
        chosen,
        inner,
        activation,
        Router(
            normalize=True,
            name="mlp.router.gate",
            score="sigmoid",
            bias="mlp.expert_bias",
            scale=fields.number("route_scale", above=0.0),
        ),
        shared=shared_experts("shared_experts", inner * fields.integer("num_shared_experts", minimum=0), activation),
    )
    mlp = Dense(shape.intermediate_size, activation)
    dense = fields.integer("num_dense_layers", minimum=0)
    return shape.model(
        (
            shape.layer(
                shape.attention(
                    rope if kind == "sliding_attention" else None,
                    window=window,
                    qkv_bias=bias,
                    output_bias=bias,
                    gate=gate,
                    **shape.qk_norms(),
                ),
                mlp if index < dense else experts,
                NORMS,
            )
            for index, (kind, window) in enumerate(zip(layer_types, windows, strict=True))
        ),
        embedding_scale=shape.hidden_size**0.5 if fields.flag("mup_enabled") else 1.0,
    )

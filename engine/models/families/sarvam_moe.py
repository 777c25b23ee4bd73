"""Sarvam's and Ling's experts: GLM-4.5's layers with one projection to q, k and v and other names of tensors."""

from __future__ import annotations

from engine.models.families import glm4_moe
from engine.models.families.common import aliased, drafting_layers, read_shape
from engine.models.families.rope import read_rope
from engine.models.fields import Fields
from engine.models.spec import ModelSpec

# What an absent field means: SarvamMoEConfig of transformers.
DEFAULTS = {
    **{name: value for name, value in glm4_moe.DEFAULTS.items() if name != "partial_rotary_factor"},
    "vocab_size": 262144,
    "intermediate_size": 8192,
    "num_hidden_layers": 19,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "rms_norm_eps": 1e-06,
    "eos_token_id": 1,
    "rope_theta": 8e6,
    "moe_intermediate_size": 1024,
    "num_experts_per_tok": 6,
    "routed_scaling_factor": 2.5,
    "use_qk_norm": True,
}
ALIASES = {
    "n_routed_experts": "num_experts",
    "n_shared_experts": "num_shared_experts",
    "attention_bias": "use_qkv_bias",
}


def read_spec(fields: Fields) -> ModelSpec:
    """attention_bias covers q, k and v but not o."""
    for name, alias in ALIASES.items():
        fields = aliased(fields, name, alias)
    shape = read_shape(fields)
    norms = {}
    if fields.flag("use_qk_norm"):
        norms = {f"{each[0]}_norm": shape.norm(f"attention.{each}_layernorm") for each in ("query", "key")}
    attention = shape.attention(
        read_rope(fields, shape),
        qkv_bias=fields.flag("attention_bias"),
        qkv=("attention.query_key_value",),
        output="attention.dense",
        **norms,
    )
    layers = glm4_moe.sigmoid_layers(fields, shape, [attention] * shape.num_layers, bias="mlp.gate.expert_bias")
    return shape.model(layers, outside=drafting_layers(fields, shape, "num_nextn_predict_layers", "num_mtp_layers"))

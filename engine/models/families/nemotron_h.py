"""Nemotron-H, Nano 2 and Nemotron 3: one block a layer, which is Mamba 2, attention without rope, an MLP or experts."""

from __future__ import annotations

import math

from engine.models.families.common import Shape, read_experts, read_plain_activation, read_shape
from engine.models.fields import Fields, show
from engine.models.mixers import Mamba2
from engine.models.spec import Experts, LayerSpec, ModelSpec, Router, Ungated

# What an absent field means: NemotronHConfig of transformers.
DEFAULTS = {
    "vocab_size": 131072,
    "hidden_size": 4096,
    "intermediate_size": 21504,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "layer_norm_epsilon": 1e-05,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    # Attention has no bias whatever it says.
    "attention_bias": False,
    "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
    "mlp_hidden_act": "relu2",
    "mlp_bias": False,
    "mamba_hidden_act": "silu",
    "mamba_num_heads": 128,
    "mamba_head_dim": 64,
    "ssm_state_size": 128,
    "n_groups": 8,
    "conv_kernel": 4,
    "use_conv_bias": True,
    "use_bias": False,
    "time_step_min": 0.001,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 7688,
    "moe_shared_expert_intermediate_size": 7688,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
}
PATTERN = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
# What layers are called, in older files and in newer ones.
KINDS = {
    "mamba": "mamba",
    "linear_attention": "mamba",
    "attention": "attention",
    "full_attention": "attention",
    "mlp": "mlp",
    "moe": "moe",
}
# Older names that count in place of the newer.
RENAMED = {"mamba_n_groups": "n_groups", "mamba_d_conv": "conv_kernel", "mamba_conv_bias": "use_conv_bias"}


def read_spec(fields: Fields) -> ModelSpec:
    """The layers are counted by `layers_block_type` or `hybrid_override_pattern`, whatever `num_hidden_layers` says."""
    kinds = _read_kinds(fields)
    values = {new: fields.raw(old) for old, new in RENAMED.items() if fields.mentions(old)}
    fields = fields.with_values({**values, "num_hidden_layers": len(kinds)})
    shape = read_shape(fields, eps="layer_norm_epsilon")
    norm = shape.norm("norm")
    bias = fields.flag("mlp_bias")
    activation = read_plain_activation(fields, "mlp_hidden_act")
    blocks: dict[str, LayerSpec] = {}
    if "mamba" in kinds:
        blocks["mamba"] = LayerSpec(_read_mamba(fields, shape), None, norm)
    if "attention" in kinds:
        names = ("mixer.q_proj", "mixer.k_proj", "mixer.v_proj")
        blocks["attention"] = LayerSpec(shape.attention(None, qkv=names, output="mixer.o_proj"), None, norm)
    if "mlp" in kinds:
        mlp = Ungated(shape.intermediate_size, activation, bias, up="mixer.up_proj", down="mixer.down_proj")
        blocks["mlp"] = LayerSpec(None, mlp, norm)
    if "moe" in kinds:
        count, chosen = read_experts(fields, "n_routed_experts", "num_local_experts")
        groups, groups_chosen = fields.integer("n_group"), fields.integer("topk_group")
        if count % groups or groups_chosen > groups:
            fields.fail(
                "n_group", f"({groups}) must divide {count} experts, and topk_group ({groups_chosen}) not exceed it"
            )
        shared = Ungated(
            fields.integer("moe_shared_expert_intermediate_size"),
            activation,
            bias,
            up="mixer.shared_experts.up_proj",
            down="mixer.shared_experts.down_proj",
        )
        experts = Experts(
            count,
            chosen,
            fields.integer("moe_intermediate_size"),
            activation,
            Router(
                fields.flag("norm_topk_prob"),
                name="mixer.gate",
                score="sigmoid",
                bias="mixer.gate.e_score_correction_bias",
                wide=True,
                groups=groups,
                groups_chosen=groups_chosen,
                scale=fields.number("routed_scaling_factor", above=0.0),
            ),
            gate_up=("mixer.experts.{}.up_proj",),
            down="mixer.experts.{}.down_proj",
            gated=False,
            shared=shared,
            latent_size=fields.optional_integer("moe_latent_size"),
            latent=("mixer.fc1_latent_proj", "mixer.fc2_latent_proj"),
            latent_bias=bias,
        )
        blocks["moe"] = LayerSpec(None, experts, norm)
    return shape.model((blocks[kind] for kind in kinds), final_norm=shape.norm("norm_f"))


def _read_kinds(fields: Fields) -> list[str]:
    given = [name for name in ("layers_block_type", "layer_types") if fields.raw(name) is not None]
    pattern = fields.raw("hybrid_override_pattern")
    if pattern is not None and not given:
        if not isinstance(pattern, str) or not pattern or not set(pattern) <= set(PATTERN):
            kinds = "M (Mamba), * (attention), - (MLP) and E (experts)"
            fields.fail("hybrid_override_pattern", f"must be text of {kinds}, not {show(pattern)}")
        return [PATTERN[letter] for letter in pattern]
    name = given[0] if given else "layers_block_type"
    words = fields.words(name)
    if not words:
        fields.fail(name, "must name at least one layer")
    for word in words:
        if word not in KINDS:
            fields.fail(name, f"must hold mamba, attention, mlp or moe, not {show(word)}")
    return [KINDS[word] for word in words]


def _read_mamba(fields: Fields, shape: Shape) -> Mamba2:
    fields.choice("mamba_hidden_act", ("silu", "swish"))
    heads, groups = fields.integer("mamba_num_heads"), fields.integer("n_groups")
    if heads % groups:
        fields.fail("n_groups", f"({groups}) must divide mamba_num_heads ({heads})")
    return Mamba2(
        heads,
        fields.integer("mamba_head_dim", maximum=4096),
        fields.integer("ssm_state_size", maximum=4096),
        groups,
        fields.integer("conv_kernel", minimum=2, maximum=64),
        shape.norm("norm"),
        norm_parts=groups,
        steps=(fields.number("time_step_min", minimum=0.0), math.inf),
        conv_bias=fields.flag("use_conv_bias"),
        bias=fields.flag("use_bias"),
        output_bias=fields.flag("use_bias"),
        name="mixer",
    )

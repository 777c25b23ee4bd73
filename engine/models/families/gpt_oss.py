"""gpt-oss: every other layer has a window, heads have sinks, and experts with biases are clamped and kept in MXFP4."""

from __future__ import annotations

from engine.models.families.common import read_experts, read_shape, read_windows
from engine.models.families.rope import read_rope
from engine.models.fields import Fields
from engine.models.spec import Clamp, Experts, ModelSpec, Router

# What an absent field means: GptOssConfig of transformers.
DEFAULTS = {
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "rope_theta": 150000.0,
    "attention_bias": True,
    "sliding_window": 128,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
}
# Where the file describes none.
ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
BLOCK = 32


def is_mxfp4(fields: Fields) -> bool:
    """Whether config.json is of this family's quantised form."""
    given, names = fields.raw("quantization_config"), fields.raw("architectures")
    ours = fields.raw("model_type") == "gpt_oss" or (isinstance(names, list) and "GptOssForCausalLM" in names)
    return ours and isinstance(given, dict) and given.get("quant_method") == "mxfp4"


def read_spec(fields: Fields) -> ModelSpec:
    """The first layer has a window, the second sees all, and so on, where `layer_types` says nothing."""
    shape = read_shape(fields)
    layer_types = fields.layer_types(shape.num_layers) or tuple(
        "full_attention" if layer % 2 else "sliding_attention" for layer in range(shape.num_layers)
    )
    windows = read_windows(fields, shape, layer_types)
    described = fields if fields.raw("rope_parameters") or fields.raw("rope_scaling") else None
    rope = read_rope(described or fields.with_values({"rope_parameters": ROPE}), shape)
    fields.choice("hidden_act", ("silu",))
    bias = fields.flag("attention_bias")
    experts = _read_experts(fields, shape.hidden_size, shape.intermediate_size)
    return shape.model(
        shape.layer(
            shape.attention(rope, window=window, qkv_bias=bias, output_bias=bias, sinks="self_attn.sinks"), experts
        )
        for window in windows
    )


def _read_experts(fields: Fields, hidden_size: int, intermediate_size: int) -> Experts:
    count, chosen = read_experts(fields, "num_local_experts", "num_experts")
    mxfp4 = is_mxfp4(fields)
    for name, size in (("hidden_size", hidden_size), ("intermediate_size", intermediate_size)):
        if mxfp4 and size % BLOCK:
            fields.fail(name, f"({size}) must be a multiple of {BLOCK} where quant_method is mxfp4")
    return Experts(
        count,
        chosen,
        intermediate_size,
        "silu",
        # The softmax of the chosen alone is that of all, made to add up to 1.
        Router(normalize=True, name="mlp.router", linear_bias=True),
        gate_up=("mlp.experts.{}.gate_up_proj",),
        down="mlp.experts.{}.down_proj",
        stacked="columns",
        bias=True,
        clamp=Clamp(fields.number("swiglu_limit", above=0.0), fields.number("swiglu_alpha")),
        mxfp4=mxfp4,
    )

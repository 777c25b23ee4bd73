"""HyperCLOVA X: Granite's factors, and norms after attention and MLP, too."""

from __future__ import annotations

from engine.models.families import granite
from engine.models.families.common import LLAMA_NORMS, read_activation, read_shape
from engine.models.families.rope import read_rope
from engine.models.fields import Fields
from engine.models.spec import Dense, ModelSpec

# What an absent field means: HyperCLOVAXConfig of transformers.
DEFAULTS = {
    **{name: value for name, value in granite.DEFAULTS.items() if name != "attention_multiplier"},
    "use_post_norm": True,
}
NORMS = ("input_layernorm", "post_norm1", "post_attention_layernorm", "post_norm2")


def read_spec(fields: Fields) -> ModelSpec:
    """A null attention_multiplier is the usual scale. Logits are multiplied by what Granite's are divided by."""
    shape = read_shape(fields)
    bias = fields.flag("attention_bias")
    scale = fields.number("attention_multiplier", shape.head_dim**-0.5, above=0.0)
    attention = shape.attention(read_rope(fields, shape), scale=scale, qkv_bias=bias, output_bias=bias)
    mlp = Dense(shape.intermediate_size, read_activation(fields, "hidden_act"), bias=fields.flag("mlp_bias"))
    norms = NORMS if fields.flag("use_post_norm") else LLAMA_NORMS
    layer = shape.layer(attention, mlp, norms, residual_scale=fields.number("residual_multiplier", above=0.0))
    return shape.model(
        [layer] * shape.num_layers,
        embedding_scale=fields.number("embedding_multiplier", above=0.0),
        logit_scale=fields.number("logits_scaling", above=0.0),
    )

"""StarCoder 2: LayerNorm, biases on all projections, an MLP without a gate."""

from __future__ import annotations

from engine.models.families.common import read_plain_activation, read_shape, read_windows
from engine.models.families.rope import read_rope
from engine.models.fields import Fields
from engine.models.spec import ModelSpec, Ungated

# What an absent field means: Starcoder2Config of transformers.
DEFAULTS = {
    "vocab_size": 49152,
    "hidden_size": 3072,
    "intermediate_size": 12288,
    "num_hidden_layers": 30,
    "num_attention_heads": 24,
    "num_key_value_heads": 2,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 4096,
    "norm_epsilon": 1e-05,
    "eos_token_id": 50256,
    "tie_word_embeddings": True,
    "rope_theta": 10000.0,
    "use_bias": True,
}


def read_spec(fields: Fields) -> ModelSpec:
    """All layers have the window, where there is one."""
    shape = read_shape(fields, eps="norm_epsilon", centered=True, bias=True)
    bias = fields.flag("use_bias")
    rope = read_rope(fields, shape)
    mlp = Ungated(
        shape.intermediate_size,
        read_plain_activation(fields, "hidden_act"),
        bias=bias,
        up="mlp.c_fc",
        down="mlp.c_proj",
    )
    windows = read_windows(fields, shape, ("sliding_attention",) * shape.num_layers)
    return shape.model(
        shape.layer(shape.attention(rope, window=window, qkv_bias=bias, output_bias=bias), mlp) for window in windows
    )

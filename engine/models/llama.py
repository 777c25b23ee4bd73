"""Llama 2 and 3, and the many checkpoints that declare themselves Llama: `LlamaForCausalLM`."""

from __future__ import annotations

from engine.models.config import ModelConfig, read_activation, read_rope, read_shape
from engine.models.fields import Fields

# What an absent field means: LlamaConfig of transformers.
DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-06,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
}


def read_config(fields: Fields) -> ModelConfig:
    """attention_bias covers q, k, v and o; no windows."""
    shape = read_shape(fields)
    attention_bias = fields.flag("attention_bias")
    return ModelConfig(
        **shape.common,
        rope=read_rope(fields, shape),
        attention_scale=shape.head_dim**-0.5,
        windows=(None,) * shape.num_layers,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=fields.flag("mlp_bias"),
        activation=read_activation(fields, "hidden_act"),
    )

"""InternLM 3: Llama by another name."""

from __future__ import annotations

from engine.models.families import llama
from engine.models.families.common import aliased
from engine.models.fields import Fields
from engine.models.spec import ModelSpec

# What an absent field means: InternLM3Config of transformers.
DEFAULTS = {
    **llama.DEFAULTS,
    "vocab_size": 128512,
    "intermediate_size": 10240,
    "num_hidden_layers": 48,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-05,
}


def read_spec(fields: Fields) -> ModelSpec:
    """Its first files call the biases qkv_bias and bias."""
    return llama.read_spec(aliased(aliased(fields, "attention_bias", "qkv_bias"), "mlp_bias", "bias"))

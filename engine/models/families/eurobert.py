"""EuroBERT: Llama that sees later tokens, too."""

from __future__ import annotations

from engine.models.families.encoders import both_ways
from engine.models.families.llama import DEFAULTS as LLAMA
from engine.models.families.llama import read_spec as read_llama
from engine.models.fields import Fields
from engine.models.spec import ModelSpec

# What an absent field means: EuroBertConfig of transformers.
DEFAULTS = {
    **LLAMA,
    "vocab_size": 128256,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-05,
    "eos_token_id": 128001,
}


def read_spec(fields: Fields) -> ModelSpec:
    return both_ways(fields, "model_type", read_llama(fields))

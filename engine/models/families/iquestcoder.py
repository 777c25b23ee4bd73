"""IQuest Coder: Llama by another name."""

from __future__ import annotations

from engine.models.families import llama
from engine.models.fields import Fields
from engine.models.spec import ModelSpec

# What an absent field means: IQuestCoderConfig of transformers.
DEFAULTS = {
    **llama.DEFAULTS,
    "vocab_size": 76800,
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "num_hidden_layers": 80,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
}


def read_spec(fields: Fields) -> ModelSpec:
    """Two switches of its first code are on in no release."""
    for name in ("clip_qkv", "use_sliding_window"):
        if fields.raw(name):
            fields.fail(name, "is not supported")
    return llama.read_spec(fields)

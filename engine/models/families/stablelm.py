"""StableLM 2 and 3B: Llama's layers with LayerNorm and a rope over a quarter of a head, some with both side by side."""

from __future__ import annotations

from typing import Any

from engine.models.families.cohere2 import NORMS
from engine.models.families.common import LLAMA_NORMS, read_activation, read_shape
from engine.models.families.rope import read_rope
from engine.models.fields import Fields
from engine.models.spec import Dense, ModelSpec

# What an absent field means: StableLmConfig of transformers.
DEFAULTS = {
    "vocab_size": 50304,
    "hidden_size": 2560,
    "intermediate_size": 6912,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "layer_norm_eps": 1e-05,
    "eos_token_id": 0,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.25,
    "use_qkv_bias": False,
    "qk_layernorm": False,
    "use_parallel_residual": False,
}


def read_spec(fields: Fields) -> ModelSpec:
    """`qk_layernorm` (StableLM 2 12B) means norms with a weight of its own for every head."""
    shape = read_shape(fields, eps="layer_norm_eps", centered=True, bias=True)
    norms: dict[str, Any] = {}
    if fields.flag("qk_layernorm"):
        norms = {f"{each}_norm": shape.norm(f"self_attn.{each}_layernorm.norms.{{}}") for each in ("q", "k")}
        norms["norm_width"] = "own"
    attention = shape.attention(read_rope(fields, shape), qkv_bias=fields.flag("use_qkv_bias"), **norms)
    mlp = Dense(shape.intermediate_size, read_activation(fields, "hidden_act"))
    parallel = fields.flag("use_parallel_residual")
    layer = shape.layer(attention, mlp, NORMS if parallel else LLAMA_NORMS, parallel=parallel)
    return shape.model([layer] * shape.num_layers)

"""GPT-NeoX (Pythia): attention and MLP side by side, each with its own LayerNorm, rope over a quarter of a head."""

from __future__ import annotations

from engine.models.families.common import LLAMA_NORMS, read_plain_activation, read_shape
from engine.models.families.rope import read_rope, scaling_fields
from engine.models.fields import Fields
from engine.models.spec import ModelSpec, Ungated

# What an absent field means: GPTNeoXConfig of transformers.
DEFAULTS = {
    "vocab_size": 50432,
    "hidden_size": 6144,
    "intermediate_size": 24576,
    "num_hidden_layers": 44,
    "num_attention_heads": 64,
    "hidden_act": "gelu",
    "max_position_embeddings": 2048,
    "layer_norm_eps": 1e-05,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.25,
    "use_parallel_residual": True,
    "attention_bias": True,
}


def read_spec(fields: Fields) -> ModelSpec:
    """Older files call rope_theta rotary_emb_base, and partial_rotary_factor rotary_pct."""
    older = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
    scaling = scaling_fields(fields)
    given = {new: fields.raw(old) for new, old in older.items() if fields.has(old) and not scaling.has(new)}
    # Sizes that the class does not know.
    fields = fields.with_values({**given, "num_key_value_heads": None, "head_dim": None})
    shape = read_shape(fields, eps="layer_norm_eps", centered=True, bias=True)
    bias = fields.flag("attention_bias")
    attention = shape.attention(
        read_rope(fields, shape),
        qkv_bias=bias,
        output_bias=bias,
        qkv=("attention.query_key_value",),
        output="attention.dense",
        heads_together=True,
    )
    activation = read_plain_activation(fields, "hidden_act")
    mlp = Ungated(shape.intermediate_size, activation, bias=True, up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h")
    layer = shape.layer(attention, mlp, LLAMA_NORMS, parallel=fields.flag("use_parallel_residual"))
    return shape.model([layer] * shape.num_layers, final_norm=shape.norm("final_layer_norm"))

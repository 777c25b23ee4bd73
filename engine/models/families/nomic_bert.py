"""NomicBert (nomic-embed-text): BERT with a rope in place of positions, gated feed-forwards and no biases."""

from __future__ import annotations

from engine.models.families.common import aliased, read_shape
from engine.models.families.encoders import embedding_of, encoder, post_norm_layer, read_gate
from engine.models.families.rope import read_rope
from engine.models.fields import Fields
from engine.models.spec import Dense, ModelSpec

# What an absent field means: NomicBertConfig of transformers.
DEFAULTS = {
    "vocab_size": 30528,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "rope_theta": 1000.0,
}
# As the files on the hub call them, which are GPT-2's.
_NAMES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "n_inner",
    "hidden_act": "activation_function",
    "layer_norm_eps": "layer_norm_epsilon",
    "rope_theta": "rotary_emb_base",
}
# Switches of those files that no model of today sets, with the only values that are served.
_FIXED = {
    "prenorm": (False,),
    "parallel_block": (False,),
    "use_rms_norm": (False,),
    "causal": (False,),
    "qkv_proj_bias": (False,),
    "mlp_fc1_bias": (False,),
    "mlp_fc2_bias": (False,),
    "rotary_emb_interleaved": (False,),
    "rotary_emb_fraction": (1.0,),
    "rotary_emb_scale_base": (None,),
    "num_experts": (0, 1),
}


def read_spec(fields: Fields) -> ModelSpec:
    """The context is the one of the training: beyond it the files' own code stretches the rope, text by text."""
    for name, own in _NAMES.items():
        fields = aliased(fields, name, own)
    fields = aliased(fields, "max_position_embeddings", "max_trained_positions")
    fields = aliased(fields, "max_position_embeddings", "n_positions")
    for name, values in _FIXED.items():
        if fields.mentions(name) and fields.raw(name) is not None and fields.raw(name) not in values:
            fields.fail(name, f"must be {' or '.join(map(str, values))}: other models of this class are not supported")
    shape = read_shape(fields, eps="layer_norm_eps", centered=True, bias=True)
    attention = shape.attention(
        read_rope(fields, shape), bidirectional=True, qkv=("attn.Wqkv",), output="attn.out_proj"
    )
    gate_up = ("mlp.fc12", "mlp.fc11")
    mlp = Dense(shape.intermediate_size, read_gate(fields, "hidden_act"), gate_up=gate_up, down="mlp.fc2")
    layer = post_norm_layer(shape, attention, mlp, ("norm1", "norm2"))
    embedding = embedding_of(fields, shape, positions=False, norm="emb_ln")
    spec: ModelSpec = encoder(fields, shape, [layer] * shape.num_layers, embedding, "encoder.layers.{}.")
    return spec

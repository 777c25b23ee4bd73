"""ModernBERT: norms before the blocks, ropes and gated feed-forwards; two layers of three have a window."""

from __future__ import annotations

from dataclasses import replace

from engine.models.families.common import read_shape
from engine.models.families.encoders import encoder, read_gate
from engine.models.families.rope import read_rope
from engine.models.fields import Fields
from engine.models.spec import Dense, Embedding, ModelSpec

# What an absent field means: ModernBertConfig of transformers.
DEFAULTS = {
    "vocab_size": 50368,
    "hidden_size": 768,
    "intermediate_size": 1152,
    "num_hidden_layers": 22,
    "num_attention_heads": 12,
    "hidden_activation": "gelu",
    "max_position_embeddings": 8192,
    "norm_eps": 1e-5,
    "norm_bias": False,
    "attention_bias": False,
    "mlp_bias": False,
    "local_attention": 128,
    "global_attn_every_n_layers": 3,
    "global_rope_theta": 160000.0,
    "local_rope_theta": 10000.0,
}


def read_spec(fields: Fields) -> ModelSpec:
    """The first layer has no norm before its attention: the embedding's is there."""
    shape = read_shape(fields, eps="norm_eps", centered=True, bias=fields.flag("norm_bias"))
    kinds = fields.layer_types(shape.num_layers)
    if kinds is None:
        every = fields.integer("global_attn_every_n_layers")
        kinds = tuple("sliding_attention" if layer % every else "full_attention" for layer in range(shape.num_layers))
    window = fields.integer("local_attention") // 2 + 1
    ropes = {
        kind: read_rope(fields, shape, theta_field=theta, layer_type=kind)
        for kind, theta in (("full_attention", "global_rope_theta"), ("sliding_attention", "local_rope_theta"))
    }
    bias = fields.flag("attention_bias")
    mlp = Dense(
        shape.intermediate_size,
        read_gate(fields, "hidden_activation"),
        bias=fields.flag("mlp_bias"),
        gate_up=("mlp.Wi",),
        down="mlp.Wo",
    )
    layers = []
    for kind in kinds:
        attention = shape.attention(
            ropes[kind],
            window=window if kind == "sliding_attention" else None,
            bidirectional=True,
            qkv_bias=bias,
            output_bias=bias,
            qkv=("attn.Wqkv",),
            output="attn.Wo",
        )
        layers.append(shape.layer(attention, mlp, ("attn_norm", None, "mlp_norm", None)))
    layers[0] = replace(layers[0], mixer_norm=None)
    embedding = Embedding("embeddings.tok_embeddings", norm=shape.norm("embeddings.norm"))
    outside = ("head.", "decoder.")
    spec: ModelSpec = encoder(
        fields, shape, layers, embedding, "layers.{}.", final_norm=shape.norm("final_norm"), outside=outside
    )
    return spec

"""DistilBERT: BERT's layers under other names, without types of tokens."""

from __future__ import annotations

from engine.models.families.common import aliased, read_shape
from engine.models.families.encoders import embedding_of, encoder, post_norm_layer, read_gelu
from engine.models.fields import Fields
from engine.models.spec import ModelSpec, Ungated

# What an absent field means: DistilBertConfig of transformers.
DEFAULTS = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "activation": "gelu",
    "max_position_embeddings": 512,
    "layer_norm_eps": 1e-12,
}
_NAMES = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
}


def read_spec(fields: Fields) -> ModelSpec:
    for name, own in _NAMES.items():
        fields = aliased(fields, name, own)
    shape = read_shape(fields, eps="layer_norm_eps", centered=True, bias=True)
    attention = shape.attention(
        None,
        bidirectional=True,
        qkv_bias=True,
        output_bias=True,
        qkv=tuple(f"attention.{name}_lin" for name in "qkv"),
        output="attention.out_lin",
    )
    activation = read_gelu(fields, "activation")
    mlp = Ungated(shape.intermediate_size, activation, bias=True, up="ffn.lin1", down="ffn.lin2")
    layer = post_norm_layer(shape, attention, mlp, ("sa_layer_norm", "output_layer_norm"))
    embedding = embedding_of(fields, shape, types=False)
    spec: ModelSpec = encoder(fields, shape, [layer] * shape.num_layers, embedding, "transformer.layer.{}.")
    return spec

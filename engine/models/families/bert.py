"""BERT, and the many encoders that are one: MiniLM, bge, e5, mxbai, gte, Arctic."""

from __future__ import annotations

from engine.models.families.common import Shape, read_shape
from engine.models.families.encoders import (
    embedding_of,
    encoder,
    post_norm_layer,
    read_gelu,
    refuse_other_positions,
)
from engine.models.fields import Fields
from engine.models.spec import LayerSpec, ModelSpec, Ungated

# What an absent field means: BertConfig of transformers.
DEFAULTS = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}


def read_spec(fields: Fields) -> ModelSpec:
    shape = read_shape(fields, eps="layer_norm_eps", centered=True, bias=True)
    return bert(fields, shape, padded=False)


def bert(fields: Fields, shape: Shape, *, padded: bool) -> ModelSpec:
    """padded: see `embedding_of`."""
    refuse_other_positions(fields)
    layers = [bert_layer(fields, shape)] * shape.num_layers
    spec: ModelSpec = encoder(fields, shape, layers, embedding_of(fields, shape, padded=padded), "encoder.layer.{}.")
    return spec


def bert_layer(fields: Fields, shape: Shape) -> LayerSpec:
    attention = shape.attention(
        None,
        bidirectional=True,
        qkv_bias=True,
        output_bias=True,
        qkv=tuple(f"attention.self.{name}" for name in ("query", "key", "value")),
        output="attention.output.dense",
    )
    mlp = Ungated(
        shape.intermediate_size,
        read_gelu(fields, "hidden_act"),
        bias=True,
        up="intermediate.dense",
        down="output.dense",
    )
    layer: LayerSpec = post_norm_layer(shape, attention, mlp, ("attention.output.LayerNorm", "output.LayerNorm"))
    return layer

"""GTE (gte-multilingual, gte-v1.5, Arctic v2.0 medium), `NewModel` on the hub: BERT, roped, with gates."""

from __future__ import annotations

from dataclasses import replace

from engine.models.families.common import Shape, read_shape
from engine.models.families.encoders import embedding_of, encoder, post_norm_layer, read_gate, refuse_other_positions
from engine.models.families.rope import read_rope, scaling_fields
from engine.models.fields import Fields
from engine.models.mixers import RopeSpec
from engine.models.spec import Dense, ModelSpec

# What an absent field means: GteConfig of transformers.
DEFAULTS = {
    "vocab_size": 250048,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "max_position_embeddings": 8192,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-12,
    "rope_theta": 160000.0,
}


def read_spec(fields: Fields) -> ModelSpec:
    if fields.raw("position_embedding_type") == "rope":
        fields = fields.with_values({"position_embedding_type": None})
    refuse_other_positions(fields)
    for name in ("pack_qkv",):
        if not fields.flag(name, True):
            fields.fail(name, "is false, which is not supported")
    shape = read_shape(fields, eps="layer_norm_eps", centered=True, bias=True)
    attention = shape.attention(
        _read_rope(fields, shape),
        bidirectional=True,
        qkv_bias=True,
        output_bias=True,
        qkv=("attention.qkv_proj",),
        output="attention.o_proj",
    )
    mlp = Dense(
        shape.intermediate_size,
        read_gate(fields, "hidden_act"),
        up_first=True,
        down_bias=True,
        gate_up=("mlp.up_gate_proj",),
    )
    layer = post_norm_layer(shape, attention, mlp, ("attn_ln", "mlp_ln"))
    embedding = embedding_of(fields, shape, positions=False)
    spec: ModelSpec = encoder(fields, shape, [layer] * shape.num_layers, embedding, "encoder.layer.{}.")
    return spec


def _read_rope(fields: Fields, shape: Shape) -> RopeSpec:
    """The hub's kind `ntk` is a longer base and, a little, longer waves: of factor^(2 / dimensions)."""
    scaling = scaling_fields(fields)
    if "ntk" not in (scaling.raw("rope_type"), scaling.raw("type")):
        return read_rope(fields, shape)
    if scaling.has("mixed_b"):
        scaling.fail("mixed_b", "is not supported")
    rope = read_rope(fields, shape, renamed={"ntk": "linear"})
    return replace(rope, theta=rope.theta * rope.factor, factor=rope.factor ** (2 / rope.rotary_dim))

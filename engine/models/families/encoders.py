"""What encoders read alike: embeddings with positions and types, activations, and layers whose norms follow the sums.

They see later tokens, too, and have no output layer; the one that some are saved with (for masked words) is left out.
Imports no torch.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from engine.models.families.common import Shape
from engine.models.fields import Fields
from engine.models.mixers import GroupedQueryAttention, Mixer
from engine.models.spec import Embedding, FeedForward, GatedActivation, ModelSpec, PlainActivation, share

# Tensors of heads that are not served, and of tables that are counted out again.
OUTSIDE = (
    "cls.",
    "embeddings.position_ids",
    "embeddings.token_type_ids",
    "lm_head.",
    "pooler.",
    "qa_outputs.",
    "vocab_layer_norm.",
    "vocab_projector.",
    "vocab_transform.",
)


def embedding_of(
    fields: Fields,
    shape: Shape,
    *,
    positions: bool = True,
    types: bool = True,
    padded: bool = False,
    norm: str = "embeddings.LayerNorm",
) -> Embedding:
    """BERT's names. padded: the first token's position is the one behind pad_token_id's, as RoBERTa has it."""
    first = fields.integer("pad_token_id", minimum=0) + 1 if padded else 0
    # The field counts rows.
    rows = fields.integer("max_position_embeddings")
    if first >= rows:
        fields.fail("max_position_embeddings", f"({rows}) must be more than pad_token_id + 1 ({first})")
    count = fields.integer("type_vocab_size", minimum=0) if types else 0
    return Embedding(
        "embeddings.word_embeddings",
        "embeddings.position_embeddings" if positions else None,
        rows if positions else 0,
        first,
        "embeddings.token_type_embeddings" if count else None,
        count,
        shape.norm(norm),
    )


def encoder(fields: Fields, shape: Shape, layers: Any, embedding: Embedding, layer_names: str, **given: Any) -> Any:
    """The ModelSpec. given: other fields of it."""
    given = {
        "final_norm": None,
        "headless": True,
        "tie_word_embeddings": False,
        "outside": OUTSIDE,
        "embedding": embedding,
        "layer_names": layer_names,
        "max_position_embeddings": shape.max_position_embeddings - embedding.first_position,
        **given,
    }
    return shape.model(layers, **given)


def post_norm_layer(shape: Shape, mixer: Mixer, feed_forward: FeedForward, norms: tuple[str, str]) -> Any:
    """norms: names of those behind the mixer's sum and the feed-forward's."""
    return shape.layer(mixer, feed_forward, (None, norms[0], None, norms[1]), post_norm=True)


def read_gelu(fields: Fields, name: str) -> PlainActivation:
    """The activation of a feed-forward without a gate."""
    known: dict[str, PlainActivation] = {
        "gelu": "gelu",
        "gelu_new": "gelu_tanh",
        "gelu_fast": "gelu_tanh",
        "gelu_pytorch_tanh": "gelu_tanh",
        "relu": "relu",
    }
    return known[fields.choice(name, known)]


def read_gate(fields: Fields, name: str) -> GatedActivation:
    """That of a feed-forward with one."""
    known: dict[str, GatedActivation] = {
        "gelu": "gelu",
        "gelu_new": "gelu_tanh",
        "gelu_pytorch_tanh": "gelu_tanh",
        "silu": "silu",
        "swish": "silu",
        "swiglu": "silu",
        "geglu": "gelu",
    }
    return known[fields.choice(name, known)]


def refuse_other_positions(fields: Fields) -> None:
    """Old BERTs may have positions that are relative to the query's, and layers may be causal."""
    if fields.has("position_embedding_type"):
        fields.choice("position_embedding_type", ("absolute",))
    for name in ("is_decoder", "add_cross_attention"):
        if fields.flag(name, False):
            fields.fail(name, "is true, which is not supported: only encoders of this class are")


def both_ways(fields: Fields, field: str, spec: ModelSpec, window: int | None = None) -> ModelSpec:
    """A decoder whose tokens see later ones, too, as `field` says: it gives no text.

    window: tokens to either side in layers that have one. Raises StartupError for layers that cannot be so.
    """
    layers = []
    for layer in spec.layers:
        mixer = layer.mixer
        if not isinstance(mixer, GroupedQueryAttention) or (mixer.window is not None and window is None):
            kind = "windows" if isinstance(mixer, GroupedQueryAttention) else "other layers than attention"
            fields.fail(field, f"asks for attention to later tokens, which is not supported with {kind}")
        layers.append(
            dataclasses.replace(
                layer,
                mixer=dataclasses.replace(mixer, bidirectional=True, window=None if mixer.window is None else window),
            )
        )
    return dataclasses.replace(spec, layers=share(layers), headless=True)

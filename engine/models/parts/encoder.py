"""Which layers go through one call (ops/encoder.py): those of BERT's form whose products are our own kernels.

Asked once for each layer when a model is built.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engine.models.mixers import GroupedQueryAttention
from engine.models.parts.attention import Attention
from engine.models.parts.dense import UngatedMlp
from engine.models.parts.norm import CenteredNorm
from engine.models.spec import LayerSpec, Ungated
from engine.ops.encoder import EncoderLayer


def whole_layer(
    spec: LayerSpec, attention: Callable[..., Any], mlp: Callable[..., Any] | None, norms: tuple[object, object]
) -> EncoderLayer | None:
    """The layer of these parts in one; None where it is of another form. norms: those behind its sums."""
    mixer, dense = spec.mixer, spec.feed_forward
    if not (isinstance(mixer, GroupedQueryAttention) and isinstance(dense, Ungated) and spec.post_norm):
        return None
    # All that the call knows of attention: anything else that a mixer may say is not for it.
    known = GroupedQueryAttention(
        mixer.num_heads,
        mixer.num_heads,
        mixer.head_dim,
        mixer.scale,
        None,
        bidirectional=True,
        qkv_bias=mixer.qkv_bias,
        output_bias=mixer.output_bias,
        qkv=mixer.qkv,
        output=mixer.output,
    )
    if mixer != known or spec.parallel or spec.residual_scale != 1.0 or spec.end_scale is not None:
        return None
    if not (isinstance(attention, Attention) and isinstance(mlp, UngatedMlp)):
        return None
    first, second = norms
    if not (isinstance(first, CenteredNorm) and isinstance(second, CenteredNorm)):
        return None
    products = *attention.products, *mlp.products
    if not EncoderLayer.takes(products, mixer.head_dim, dense.activation):
        return None
    return EncoderLayer(
        products,
        [(norm.weight, norm.bias, norm.eps) for norm in (first, second)],
        heads=mixer.num_heads,
        head_dim=mixer.head_dim,
        scale=mixer.scale,
        activation=dense.activation,
    )

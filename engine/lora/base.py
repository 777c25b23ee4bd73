"""What a base layer's own numbers are, for adapters that need them: its rows in float32, dequantised, and its bias.

Called off the event loop, on any thread, while the executor multiplies by the same weights; nothing is written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.models.loading.adapted import ExpertMatrix, Heads, Place
from engine.ops.linear import Linear
from engine.ops.mxfp4 import Mxfp4Linear, dequantised
from engine.ops.packed import MixedLinear


def own_rows(place: Place) -> tuple[Tensor, Tensor]:
    """int64 [count] each: the layer's outputs that are of a place, and which of the place's own each of them is."""
    of_checkpoint = torch.arange(place.linear.out_features)
    if place.order is not None:
        of_checkpoint[: len(place.order)] = place.order.cpu()
    inside = (of_checkpoint >= place.first) & (of_checkpoint < place.first + place.count)
    ours = inside.nonzero().flatten()
    return ours, of_checkpoint[ours] - place.first


def base_rows(linear: Linear | Mxfp4Linear | Heads | ExpertMatrix, rows: Tensor) -> Tensor | None:
    """float32 [n, in] on the host: these rows of a layer's weight, in its own order; None where its form has lost
    them."""
    if isinstance(linear, Heads | ExpertMatrix):
        return None
    if isinstance(linear, Mxfp4Linear):
        return dequantised(linear._blocks[rows], linear._scales[rows], torch.float32)
    if isinstance(linear, MixedLinear):
        parts = []
        for part in linear.parts:
            inside = rows[(rows >= 0) & (rows < part.out_features)]
            rows = rows - part.out_features
            if len(inside) and (found := base_rows(part, inside)) is not None:
                parts.append(found)
            elif len(inside):
                return None
        return torch.cat(parts)
    if linear.kind == "onednn":
        # Its own form: what it makes of one input alone is a column. A sum with zeros rounds nothing.
        columns = [linear(part) for part in torch.split(torch.eye(linear.in_features, dtype=linear.dtype), 256)]
        weight = torch.cat(columns).T.float()
        own = getattr(linear, "_bias", None)
        return None if own is not None else weight[rows]
    return linear.rows(rows.to(linear.device)).float().cpu()


def base_bias(place: Place) -> Tensor | None:
    """float32 [count] in the checkpoint's order; None where there is none."""
    bias = _bias_of(place.linear)
    if bias is None:
        return None
    ours, theirs = own_rows(place)
    found = torch.empty(place.count)
    found[theirs] = bias[ours]
    return found


def _bias_of(linear: Linear | Mxfp4Linear | Heads | ExpertMatrix) -> Tensor | None:
    if isinstance(linear, Heads | ExpertMatrix):
        return None
    if isinstance(linear, Mxfp4Linear):
        return linear._wide_bias
    if isinstance(linear, MixedLinear):
        if not linear.has_bias:
            return None
        own = [_bias_of(part) for part in linear.parts]
        return torch.cat(
            [
                torch.zeros(part.out_features) if each is None else each
                for part, each in zip(linear.parts, own, strict=True)
            ]
        )
    inner = getattr(linear, "inner", None)
    if isinstance(inner, Linear):
        return _bias_of(inner)
    bias = linear._bias
    return None if bias is None else bias.float().cpu()

"""What a base layer's own numbers are, for adapters that need them: its rows in float32, dequantised, and its bias.
And what of an adapter is one rank's, where several compute one model: rows of B beside the outputs that it has, columns
of A beside its inputs, and rows of its tokens. Of one process alone it is all.

Called off the event loop, on any thread, while the executor multiplies by the same weights; nothing is written.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.models.loading.adapted import ExpertMatrix, Heads, Layer, Place
from engine.ops.linear import Linear
from engine.ops.lora import Factors
from engine.ops.mxfp4 import Mxfp4Linear, dequantised
from engine.ops.packed import MixedLinear


def own_rows(place: Place) -> tuple[Tensor, Tensor]:
    """int64 [count] each: the layer's outputs that are of a place, and which of the place's own each of them is. Of a
    rank's layer those that it has."""
    part = place.part
    order = place.order if part is None else part.order
    of_checkpoint = torch.arange(base_of(place).out_features)
    if order is not None:
        of_checkpoint[: len(order)] = order.cpu()
    if part is not None and part.rows is not None:
        of_checkpoint = part.rows[of_checkpoint]
    inside = (of_checkpoint >= place.first) & (of_checkpoint < place.first + place.count)
    ours = inside.nonzero().flatten()
    return ours, of_checkpoint[ours] - place.first


def base_of(place: Place) -> Layer:
    """The layer whose numbers this process has."""
    if place.part is None:
        return place.linear
    assert place.part.linear is not None
    return place.part.linear


def base_rows(linear: Layer, rows: Tensor) -> Tensor | None:
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
    """float32 [count] in the checkpoint's order, 0 for what a rank has not; None where there is none."""
    bias = _bias_of(base_of(place))
    if bias is None:
        return None
    ours, theirs = own_rows(place)
    found = torch.zeros(place.count)
    found[theirs] = bias[ours]
    return found


def _bias_of(linear: Layer) -> Tensor | None:
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


def is_here(place: Place) -> bool:
    """Whether this rank has anything of the layer."""
    return place.part is None or place.part.linear is not None


def vector_here(place: Place, vector: Tensor | None) -> Tensor | None:
    """Of the outputs, in the checkpoint's order."""
    rows = None if place.part is None else place.part.rows
    return vector if vector is None or rows is None else vector[rows]


def factors_here(place: Place, factors: Sequence[Factors]) -> list[Factors]:
    """A and B of the same product."""
    part = place.part
    if part is None:
        return list(factors)
    found = []
    for first, down, up in ((each.first, each.down, each.up) for each in factors):
        if part.tokens is not None or part.columns is not None:
            down = down[:, slice(*(part.tokens or part.columns or ()))].contiguous()
        if part.rows is not None:
            begin, end = torch.searchsorted(part.rows, torch.tensor([first, first + len(up)])).tolist()
            first, up = begin, up[part.rows[begin:end] - first].contiguous()
        if len(up):
            found.append(Factors(first, down, up))
    return found


def outputs_here(place: Place, outputs: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs [n] of the whole layer and what is in their place, [n, in]: by the numbers that they have here."""
    held = None if place.part is None else place.part.rows
    if held is None:
        return outputs, rows
    at = torch.searchsorted(held, outputs).clamp_(max=len(held) - 1)
    kept = held[at] == outputs
    return at[kept], rows[kept]


def tokens_here(
    place: Place, table: dict[int, int] | None, rows: Tensor | None
) -> tuple[dict[int, int] | None, Tensor | None]:
    """Rows of an embedding, by token or for all of them: see Branch."""
    tokens = None if place.part is None else place.part.tokens
    if tokens is None or rows is None:
        return table, rows
    first, end = tokens
    if table is None:
        return None, rows[first:end]
    own = {token - first: row for token, row in table.items() if first <= token < end}
    return (own, rows) if own else (None, None)

"""K and V in eight bits: how a token lies in the pools of `--kv-cache-dtype int8`, and the same in plain torch.

A token has an int8 code for each number of its heads, head after head, and then a bfloat16 scale for each head. A key
whose front is the value has two, for its front is a latent and its end a rotated key. What a token has depends on
nothing but its own numbers: neither its page, nor its batch, nor how its prompt was cut changes a bit of it.
kernels.cpp does the same, operation by operation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from engine.ops.attention.base import LayerAttention

LARGEST = 127
# Numbers below this are zero: the inverse of their scale would not be finite.
SMALLEST = 1e-30


def split_of(layer: LayerAttention) -> int:
    """From there on a key's numbers have a second scale; its head_dim where there is one alone."""
    return layer.value_dim if layer.values_in_keys else layer.head_dim


def widths(layer: LayerAttention) -> tuple[int, int]:
    """Bytes of K and of V that a layer keeps of a token."""
    keys, values = layer.widths
    parts = 2 if split_of(layer) < layer.head_dim else 1
    return _width(keys, layer.num_kv_heads * parts), _width(values, layer.num_kv_heads if values else 0)


def _width(codes: int, scales: int) -> int:
    return _scales_at(codes) + 2 * scales


def _scales_at(codes: int) -> int:
    return codes + codes % 2


def scales_of(buffer: Tensor, heads: int, dim: int, parts: int = 1) -> Tensor:
    """buffer int8 [pages, page_size, width] -> its scales, bfloat16 [pages, page_size, heads, parts]; a view."""
    begin = _scales_at(heads * dim)
    part = buffer[:, :, begin : begin + 2 * heads * parts]
    return part.view(torch.bfloat16).unflatten(2, (heads, parts))


def to_codes(x: Tensor, split: int) -> tuple[Tensor, Tensor]:
    """x [T, H, D] -> int8 [T, H, D] and bfloat16 [T, H, 1 or 2]. Where numbers are not finite, neither is the scale."""
    codes, scales = [], []
    for part in x.float().tensor_split((split,), -1) if split < x.shape[-1] else (x.float(),):
        top = part.abs().amax(-1, keepdim=True)
        # Up to the next bfloat16, so that no code is beyond 127.
        bits = (top / LARGEST).view(torch.int32)
        scale = (((bits + 0xFFFF) >> 16) << 16).view(torch.float32)
        inverse = 1 / scale
        finite, tiny = top.isfinite(), top < SMALLEST
        scale = torch.where(finite, scale.masked_fill(tiny, 0.0), torch.nan)
        codes.append(torch.where(finite & ~tiny, part * inverse, 0.0).round().to(torch.int8))
        scales.append(scale.to(torch.bfloat16))
    return torch.cat(codes, -1), torch.cat(scales, -1)


def to_numbers(codes: Tensor, scales: Tensor, split: int) -> Tensor:
    """int8 [T, H, D] and bfloat16 [T, H, 1 or 2] -> float32 [T, H, D]."""
    each = scales.float()
    if split < codes.shape[-1]:
        front, end = codes.float().tensor_split((split,), -1)
        return torch.cat((front * each[..., :1], end * each[..., 1:]), -1)
    return codes.float() * each

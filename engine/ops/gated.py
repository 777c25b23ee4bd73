"""Gate, up and activation of many rows in one launch on a GPU, which spares the way of [rows, 2 inner] through memory.

Used by ops/linear.py for the weights with which the executor has found it faster than cuBLAS and a second launch
(executor/cuda_products.py).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from engine.ops.activation import GATED_ACTIVATIONS
from engine.ops.triton.runtime import on_gpu

# Rows and columns of the result and bytes of K at a time, warps, loads under way.
Tile = tuple[int, int, int, int, int]
TILES: tuple[Tile, ...] = ((128, 128, 128, 8, 3), (128, 64, 128, 4, 4))
# Fewer rows do not fill the GPU with such tiles.
LEAST_ROWS = 256


def gated_product(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, tile: Tile) -> Tensor:
    """x [R, in], weight [2 inner, in], bias [2 inner] or None -> [R, inner]: act(first half) * second half.

    activation: one of GATED_ACTIVATIONS. Summed in float32 and rounded once.
    """
    if on_gpu(x):
        from engine.ops.triton import gated as kernels

        return kernels.gated_product(x, weight, bias, activation, tile)
    return torch_gated_product(x, weight, bias, activation)


def torch_gated_product(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """The same in torch."""
    wide = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    return GATED_ACTIVATIONS[activation](wide).to(x.dtype)

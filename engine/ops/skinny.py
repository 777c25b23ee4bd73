"""Products of 1 to 4 rows on a GPU, where reading the weight is all the work and cuBLAS may not read at full speed.

Used by ops/linear.py for the shapes in which the executor has found them faster (executor/cuda_products.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ops.activation import GATED_ACTIVATIONS
from engine.ops.norm import Normed
from engine.ops.triton.runtime import on_gpu

Blocks = tuple[int, int, int]
# (rows of the weight, columns at a time, warps) of a program. The warps stand side by side along a row, 16 bytes a
# thread, so that none needs another's part of x: 48, 48 and 32 registers for one row of x.
BLOCKS = ((2, 1024, 4), (2, 512, 2), (1, 2048, 8))


def skinny_product(
    x: Tensor | Normed,
    weight: Tensor,
    bias: Tensor | None,
    blocks: Blocks,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """x [R, in], weight [out, in], bias [out] or None -> [R, out], summed in float32 and rounded once.

    activation: one of GATED_ACTIVATIONS, which makes [R, out / 2] of it: act(first half) * second half. residual
    [R, out]: is added to, in its memory.
    """
    source, norm = (x.x, (x.weight, x.eps)) if isinstance(x, Normed) else (x, None)
    if on_gpu(source):
        from engine.ops.triton import skinny as kernels

        return kernels.skinny_product(source, weight, bias, blocks, activation, norm, residual)
    return torch_skinny_product(x, weight, bias, activation, residual)


def torch_skinny_product(
    x: Tensor | Normed,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The same in torch."""
    if isinstance(x, Normed):
        dtype, wide = x.x.dtype, x.x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + x.eps) * x.weight.float()
    else:
        dtype, wide = x.dtype, x.float()
    result = F.linear(wide, weight.float(), None if bias is None else bias.float())
    if activation is not None:
        result = GATED_ACTIVATIONS[activation](result)
    return result.to(dtype) if residual is None else residual.copy_(result + residual.float())

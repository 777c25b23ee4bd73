"""Linear layers whose weights stay in MXFP4: four-bit floats in blocks of 32 with a power of two each (OCP MX 1.0).

Called by models/parts/clamped.py on the executor's thread. A weight is TABLE[code] * 2^(scale - 127), which is exact in
float32 and bfloat16: nothing is rounded but the sums.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ops.packed import PackedLinear, can_stay_packed

BLOCK = 32
# e2m1: sign, two bits of exponent, one of mantissa.
TABLE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def dequantised(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 blocks [..., B, 16], the low half of a byte first, and scales [..., B] -> [..., 32 B]."""
    table = torch.tensor(TABLE, dtype=torch.float32, device=blocks.device)
    codes = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2)
    values = torch.ldexp(table[codes.int()], scales.int()[..., None] - 127)
    return values.to(dtype).flatten(-2)


class Mxfp4Linear:
    """y = x weight^T + bias, where there are no kernels for it: the weight becomes numbers each time.

    blocks uint8 [out, in / 32, 16], scales uint8 [out, in / 32], bias [out].
    """

    def __init__(self, blocks: Tensor, scales: Tensor, bias: Tensor) -> None:
        self.out_features, self.in_features = blocks.shape[0], blocks.shape[1] * BLOCK
        self._blocks, self._scales, self._bias = blocks, scales, bias
        self._wide_bias = bias.float()

    def __call__(self, x: Tensor) -> Tensor:
        """[T, in_features] -> [T, out_features] of the same dtype."""
        return F.linear(x, dequantised(self._blocks, self._scales, x.dtype), self._bias.to(x.dtype))


def mxfp4_linear(blocks: Tensor, scales: Tensor, bias: Tensor, dtype: torch.dtype) -> PackedLinear | Mxfp4Linear:
    """A layer of what Mxfp4Linear takes, with kernels where there are some. dtype: of inputs and outputs."""
    if not can_stay_packed(dtype, blocks.device):
        return Mxfp4Linear(blocks, scales, bias)
    # GGUF's blocks of this type: the exponent, then codes of the first half in the low halves of bytes.
    codes = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2)
    low, high = codes.chunk(2, -1)
    rows = torch.cat((scales[..., None], low | high << 4), -1).flatten(1)
    layer = PackedLinear("MXFP4", len(blocks), blocks.shape[1] * BLOCK, dtype, bias)
    bad = layer.pack(0, rows.data_ptr() + torch.arange(len(rows)) * rows.stride(0))
    assert bad is None, "checked where it was read"
    return layer

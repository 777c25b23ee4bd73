"""Linear layers whose weights stay in MXFP4: four-bit floats in blocks of 32 with a power of two each (OCP MX 1.0).

Called by models/parts/clamped.py on the executor's thread. A weight is TABLE[code] * 2^(scale - 127), which is exact in
float32 and bfloat16: nothing is rounded but the sums.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ops import native

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
    """y = x weight^T + bias. blocks uint8 [out, in / 32, 16], scales uint8 [out, in / 32], bias [out]."""

    def __init__(self, blocks: Tensor, scales: Tensor, bias: Tensor) -> None:
        self.out_features, self.in_features = blocks.shape[0], blocks.shape[1] * BLOCK
        self._blocks, self._scales, self._bias = blocks, scales, bias
        self._wide_bias = bias.float()

    def __call__(self, x: Tensor) -> Tensor:
        """[T, in_features] -> [T, out_features] of the same dtype."""
        library, code = native.library(), native.type_code(x.dtype)
        if library is None or code is None or not x.is_cpu:
            return F.linear(x, dequantised(self._blocks, self._scales, x.dtype), self._bias.to(x.dtype))
        if x.stride(1) != 1:
            x = x.contiguous()
        assert x.shape[1] == self.in_features
        rows, out_features = x.shape[0], self.out_features
        out = torch.empty((rows, out_features), dtype=x.dtype)
        library.by_work(rows * out_features * self.in_features // 8).ol_mxfp4_linear(
            code,
            x.data_ptr(),
            x.stride(0),
            rows,
            self.in_features,
            self._blocks.data_ptr(),
            self._scales.data_ptr(),
            out_features,
            self._wide_bias.data_ptr(),
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out

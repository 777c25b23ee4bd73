"""Gate and up of many rows in one product on tensor cores, with the activation at its end. Called by ops/gated.py.

A program owns a tile of the result and sums it of gate and of up side by side, over K in the same order always; neither
is ever written. Programs of a few tiles of rows go through the columns together, so that a weight is read while it is
in the L2 cache. The reference is `torch_gated_product` there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.ops.triton.pdl import launch_options, overlap

# Tiles of rows that go through the columns together.
TOGETHER = 8


@triton.jit
def _gated(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    rows,
    inner,
    in_features,
    x_stride,
    BIAS: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TOGETHER: tl.constexpr,
    PDL: tl.constexpr,
):
    overlap(PDL)
    row_tiles, columns = tl.cdiv(rows, BLOCK_M), tl.cdiv(inner, BLOCK_N)
    program = tl.program_id(0)
    first = program // (TOGETHER * columns) * TOGETHER
    height = min(row_tiles - first, TOGETHER)
    place = program % (TOGETHER * columns)
    m = (first + place % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = place // height * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Rows and columns that are not there are others, whose results are not kept.
    x_at = x_ptr + (m % rows).to(tl.int64)[:, None] * x_stride + k[None, :]
    gate_at = weight_ptr + (n % inner).to(tl.int64)[None, :] * in_features + k[:, None]
    up_at = gate_at + tl.cast(inner, tl.int64) * in_features
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, in_features, BLOCK_K):
        here = k < in_features - start
        x = tl.load(x_at + start, mask=here[None, :], other=0.0)
        gate = tl.dot(x, tl.load(gate_at + start, mask=here[:, None], other=0.0), gate, input_precision="ieee")
        up = tl.dot(x, tl.load(up_at + start, mask=here[:, None], other=0.0), up, input_precision="ieee")
    kept = n < inner
    if BIAS:
        gate += tl.load(bias_ptr + n, mask=kept, other=0.0).to(tl.float32)[None, :]
        up += tl.load(bias_ptr + inner + n, mask=kept, other=0.0).to(tl.float32)[None, :]
    if GELU:  # see activation.py
        y = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        gate = gate / (1.0 + tl.exp(-2.0 * y))
    else:
        gate = gate / (1.0 + tl.exp(-gate))
    out_at = out_ptr + m.to(tl.int64)[:, None] * inner + n[None, :]
    tl.store(out_at, (gate * up).to(out_ptr.dtype.element_ty), mask=(m < rows)[:, None] & kept[None, :])


def gated_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, tile: tuple[int, int, int, int, int]
) -> Tensor:
    """See ops/gated.py."""
    rows, in_features = x.shape
    inner = weight.shape[0] // 2
    assert x.stride(1) == 1 and weight.is_contiguous() and weight.shape[1] == in_features
    height, width, k_bytes, num_warps, num_stages = tile
    out = torch.empty((rows, inner), dtype=x.dtype, device=x.device)
    _gated[(triton.cdiv(rows, height) * triton.cdiv(inner, width),)](
        x,
        weight,
        weight if bias is None else bias,
        out,
        rows,
        inner,
        in_features,
        x.stride(0),
        BIAS=bias is not None,
        GELU=activation == "gelu_tanh",
        BLOCK_M=height,
        BLOCK_N=width,
        BLOCK_K=k_bytes // x.dtype.itemsize,
        TOGETHER=TOGETHER,
        num_warps=num_warps,
        num_stages=num_stages,
        **launch_options(),
    )
    return out

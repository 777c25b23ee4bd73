"""A product of few rows with a weight, as fast as the weight can be read. Called by ops/skinny.py on CUDA tensors.

A program owns BLOCK_N rows of the weight and reads them once, all of K; every thread keeps its partial sums in
registers, so nothing is exchanged before the end and the order of a sum never changes. An RMS norm of x is taken on
the way (its weight before the sum, its scale behind it), a residual is added at the end. The first weights are under
way before the kernel ahead has ended, and each next ones before the last are used. The reference is
`torch_skinny_product` there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.ops.triton.pdl import launch_options, overlap


@triton.jit
def _skinny(
    x_ptr,
    gain_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    rows,
    x_stride,
    out_stride,
    out_features,
    in_features,
    eps,
    ROWS: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    GATED: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.arange(0, ROWS)[:, None, None]
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :, None]
    column = tl.arange(0, BLOCK_K)[None, None, :]
    inside = n < out_features
    weight_at = weight_ptr + n.to(tl.int64) * in_features + column
    up_at = weight_at + tl.cast(out_features, tl.int64) * in_features
    x_at = x_ptr + row * x_stride + column
    total = tl.zeros((ROWS, BLOCK_N, BLOCK_K), tl.float32)
    up = tl.zeros((ROWS, BLOCK_N, BLOCK_K), tl.float32)
    # Of the eight columns that a thread reads at a time: one register a row.
    squares = tl.zeros((ROWS, BLOCK_K // 8), tl.float32)
    # A weight is read once: it must not drive x out of the cache.
    here = inside & (column < in_features)
    weight = tl.load(weight_at, mask=here, other=0.0, eviction_policy="evict_first")
    if GATED:
        up_weight = tl.load(up_at, mask=here, other=0.0, eviction_policy="evict_first")
    overlap(PDL)
    for first in range(0, in_features, BLOCK_K):
        left = column < in_features - first
        x = tl.load(x_at + first, mask=(row < rows) & left, other=0.0).to(tl.float32)
        then = inside & (column < in_features - first - BLOCK_K)
        next_weight = tl.load(weight_at + first + BLOCK_K, mask=then, other=0.0, eviction_policy="evict_first")
        if GATED:
            next_up = tl.load(up_at + first + BLOCK_K, mask=then, other=0.0, eviction_policy="evict_first")
        if NORM:
            squares += tl.sum(tl.reshape(x * x, (ROWS, BLOCK_K // 8, 8)), axis=2)
            x *= tl.load(gain_ptr + column + first, mask=left, other=0.0).to(tl.float32)
        total += x * weight.to(tl.float32)
        weight = next_weight
        if GATED:
            up += x * up_weight.to(tl.float32)
            up_weight = next_up
    result = tl.sum(total, axis=2)
    row = tl.arange(0, ROWS)[:, None]
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    scale = tl.full((ROWS, 1), 1.0, tl.float32)
    if NORM:
        scale = 1.0 / tl.sqrt(tl.sum(squares, axis=1, keep_dims=True) / in_features + eps)
        result *= scale
    if BIAS:
        result += tl.load(bias_ptr + n, mask=n < out_features, other=0.0).to(tl.float32)
    if GATED:
        other = tl.sum(up, axis=2)
        if NORM:
            other *= scale
        if BIAS:
            other += tl.load(bias_ptr + out_features + n, mask=n < out_features, other=0.0).to(tl.float32)
        if GELU:  # see activation.py
            y = 0.7978845608028654 * (result + 0.044715 * result * result * result)
            result = result / (1.0 + tl.exp(-2.0 * y))
        else:
            result = result / (1.0 + tl.exp(-result))
        result = result * other
    at = out_ptr + row * out_stride + n
    mask = (row < rows) & (n < out_features)
    if ADD:
        result += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, result.to(out_ptr.dtype.element_ty), mask=mask)


def skinny_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    blocks: tuple[int, int, int],
    activation: str | None,
    norm: tuple[Tensor, float] | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """See ops/skinny.py."""
    rows, in_features = x.shape
    assert x.stride(1) == 1 and weight.is_contiguous() and weight.shape[1] == in_features
    out_features = weight.shape[0] // (2 if activation else 1)
    block_n, block_k, num_warps = blocks
    out = torch.empty((rows, out_features), dtype=x.dtype, device=x.device) if residual is None else residual
    assert out.shape == (rows, out_features) and out.stride(1) == 1 and out.dtype == x.dtype
    gain, eps = (weight, 0.0) if norm is None else norm
    _skinny[(triton.cdiv(out_features, block_n),)](
        x,
        gain,
        weight,
        weight if bias is None else bias,
        out,
        rows,
        x.stride(0),
        out.stride(0),
        out_features,
        in_features,
        eps,
        ROWS=triton.next_power_of_2(rows),
        NORM=norm is not None,
        BIAS=bias is not None,
        ADD=residual is not None,
        GATED=activation is not None,
        GELU=activation == "gelu_tanh",
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=num_warps,
        **launch_options(),
    )
    return out

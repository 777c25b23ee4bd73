"""A product of few rows with a weight, as fast as the weight can be read. Called by ops/skinny.py on CUDA tensors.

A program owns BLOCK_N rows of the weight and reads them once, all of K; every thread keeps its partial sums in
registers, so nothing is exchanged before the end and the order of a sum never changes. The reference is
`torch_skinny_product` there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _skinny(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    rows,
    x_stride,
    out_features,
    in_features,
    ROWS: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
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
    for first in range(0, in_features, BLOCK_K):
        left = column < in_features - first
        x = tl.load(x_at + first, mask=(row < rows) & left, other=0.0).to(tl.float32)
        # A weight is read once: it must not drive x out of the cache.
        weight = tl.load(weight_at + first, mask=inside & left, other=0.0, eviction_policy="evict_first")
        total += x * weight.to(tl.float32)
        if GATED:
            weight = tl.load(up_at + first, mask=inside & left, other=0.0, eviction_policy="evict_first")
            up += x * weight.to(tl.float32)
    result = tl.sum(total, axis=2)
    row = tl.arange(0, ROWS)[:, None]
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    if BIAS:
        result += tl.load(bias_ptr + n, mask=n < out_features, other=0.0).to(tl.float32)
    if GATED:
        other = tl.sum(up, axis=2)
        if BIAS:
            other += tl.load(bias_ptr + out_features + n, mask=n < out_features, other=0.0).to(tl.float32)
        if GELU:  # see activation.py
            y = 0.7978845608028654 * (result + 0.044715 * result * result * result)
            result = result / (1.0 + tl.exp(-2.0 * y))
        else:
            result = result / (1.0 + tl.exp(-result))
        result = result * other
    at = out_ptr + row * out_features + n
    tl.store(at, result.to(out_ptr.dtype.element_ty), mask=(row < rows) & (n < out_features))


def skinny_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, blocks: tuple[int, int, int], activation: str | None
) -> Tensor:
    """See ops/skinny.py."""
    rows, in_features = x.shape
    assert x.stride(1) == 1 and weight.is_contiguous() and weight.shape[1] == in_features
    out_features = weight.shape[0] // (2 if activation else 1)
    block_n, block_k, num_warps = blocks
    out = torch.empty((rows, out_features), dtype=x.dtype, device=x.device)
    _skinny[(triton.cdiv(out_features, block_n),)](
        x,
        weight,
        weight if bias is None else bias,
        out,
        rows,
        x.stride(0),
        out_features,
        in_features,
        ROWS=triton.next_power_of_2(rows),
        BIAS=bias is not None,
        GATED=activation is not None,
        GELU=activation == "gelu_tanh",
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=num_warps,
    )
    return out

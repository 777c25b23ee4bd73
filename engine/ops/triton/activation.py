"""Gated activations in one launch. Called by ops/activation.py for CUDA tensors.

The reference is `torch_gate_and_mul` there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.ops.triton.pdl import launch_options, overlap

BLOCK = 1024


@triton.jit
def _gate_and_mul(x_ptr, out_ptr, x_stride, inner, GELU: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    overlap(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < inner
    gate = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * x_stride + inner + column, mask=mask, other=0.0).to(tl.float32)
    if GELU:
        # tanh(y) = 2 sigmoid(2y) - 1, so 0.5 x (1 + tanh(y)) = x sigmoid(2y)
        y = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        gate = gate / (1.0 + tl.exp(-2.0 * y))
    else:
        gate = gate / (1.0 + tl.exp(-gate))
    tl.store(out_ptr + row * inner + column, (gate * up).to(out_ptr.dtype.element_ty), mask=mask)


def gate_and_mul(x: Tensor, *, gelu: bool) -> Tensor:
    """[N, 2I] -> [N, I]: act(first half) * second half, in float32, rounded once."""
    rows, inner = x.shape[0], x.shape[1] // 2
    assert x.stride(1) == 1
    out = torch.empty((rows, inner), dtype=x.dtype, device=x.device)
    grid = (rows, triton.cdiv(inner, BLOCK))
    _gate_and_mul[grid](x, out, x.stride(0), inner, GELU=gelu, BLOCK=BLOCK, num_warps=4, **launch_options())
    return out

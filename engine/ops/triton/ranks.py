"""Parts of several ranks added up in their order, one launch. Called by ops/device_parallel.py for CUDA tensors.

The reference is `torch_add_up` there. An element's sum knows nothing of the others, so its bits are those of any batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.ops.triton.pdl import launch_options, overlap

BLOCK = 1024


@triton.jit
def _add_up(
    parts_ptr,
    bias_ptr,
    out_ptr,
    rows,
    columns,
    RANKS: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    at = tl.program_id(0).to(tl.int64) * columns + column
    overlap(PDL)
    each = tl.cast(rows, tl.int64) * columns
    total = tl.load(parts_ptr + at, mask=mask, other=0.0).to(tl.float32)
    for rank in tl.static_range(1, RANKS):
        total += tl.load(parts_ptr + rank * each + at, mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        total += tl.load(bias_ptr + column, mask=mask, other=0.0)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=mask)


def add_up(parts: Tensor, bias: Tensor | None = None) -> Tensor:
    """parts [ranks, T, C], bias float32 [C] or None -> [T, C]."""
    assert parts.is_contiguous()
    ranks, rows, columns = parts.shape
    out = torch.empty((rows, columns), dtype=parts.dtype, device=parts.device)
    _add_up[(rows, triton.cdiv(columns, BLOCK))](
        parts,
        parts if bias is None else bias,
        out,
        rows,
        columns,
        RANKS=ranks,
        BIAS=bias is not None,
        BLOCK=BLOCK,
        num_warps=4,
        **launch_options(),
    )
    return out

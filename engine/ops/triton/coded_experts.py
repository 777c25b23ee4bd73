"""Products of experts whose matrices stay codes, block by block of pairs (experts.py), widened in registers (coded.py).

Called by experts.py on CUDA tensors. A program owns a block of one expert's pairs and some columns of the result, and
goes along K in the same order always; gate and up are summed side by side, and their activation comes with them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from engine.ops.triton.coded import UNROLL, block_sum, given, unroll
from engine.ops.triton.gates import NONE, Pairs, gate_of, gated
from engine.ops.triton.pdl import launch_options, overlap

if TYPE_CHECKING:  # which ask for this module late
    from engine.ops.device_coded import Codes
    from engine.ops.experts import Activation, CodedTile


@triton.jit
def _multiply_codes(
    x_ptr,
    codes_ptr,
    scale_ptr,
    low_ptr,
    table_ptr,
    bias_ptr,
    out_ptr,
    order_ptr,
    owners_ptr,
    pairs,
    x_stride,
    out_features,
    in_features,
    all_rows,
    limit,
    alpha,
    PER_ROW: tl.constexpr,
    SORTED: tl.constexpr,
    GATE: tl.constexpr,
    BIAS: tl.constexpr,
    FORM: tl.constexpr,
    PAIRS: tl.constexpr,
    LOW: tl.constexpr,
    EVERY: tl.constexpr,
    WIDTH: tl.constexpr,
    UNROLL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """Row pair // PER_ROW of x times the weight of the pair's expert, to row `pair` of out."""
    overlap(PDL)
    block = tl.program_id(0)
    owner = tl.load(owners_ptr + block)
    if owner < 0:
        return
    row = tl.arange(0, ROWS)
    if SORTED:
        pair = tl.load(order_ptr + block * ROWS + row)
        valid = pair < pairs
    else:  # a block for each pair
        pair = block + tl.zeros((ROWS,), tl.int32)
        valid = row == 0
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, WIDTH)
    kept, here = n < out_features, valid[:, None]
    x_at = x_ptr + (pair // PER_ROW).to(tl.int64)[:, None] * x_stride + k[None, :]
    # Columns that are not there are others, whose results are not kept.
    bytes_of_row = in_features // 2 if PAIRS else in_features
    top = owner.to(tl.int64) * out_features * (2 if GATE != NONE else 1)
    codes_at = codes_ptr + (top + n % out_features)[None, :] * bytes_of_row + k[:, None]
    above = tl.cast(out_features, tl.int64) * bytes_of_row
    scale_at, low_at = scale_ptr + top + n, low_ptr + top + n
    total = tl.zeros((ROWS, BLOCK_N), tl.float32)
    up = tl.zeros((ROWS, BLOCK_N), tl.float32)
    for piece in range(0, bytes_of_row // WIDTH, UNROLL):
        for each in tl.static_range(UNROLL):
            codes = tl.load(codes_at + (piece + each) * WIDTH)
            others = codes
            if GATE != NONE:
                others = tl.load(codes_at + above + (piece + each) * WIDTH)
            for half in tl.static_range(2 if PAIRS else 1):
                number = (2 if PAIRS else 1) * (piece + each) + half
                first = tl.cast(number // EVERY, tl.int64) * all_rows
                x = tl.load(x_at, mask=here, other=0.0)
                own = ((codes >> (4 * half)) & 15) if PAIRS else codes
                total = block_sum(total, x, own, scale_at + first, low_at + first, kept, table_ptr, FORM, LOW)
                if GATE != NONE:
                    first += out_features
                    own = ((others >> (4 * half)) & 15) if PAIRS else others
                    up = block_sum(up, x, own, scale_at + first, low_at + first, kept, table_ptr, FORM, LOW)
                x_at += WIDTH
    if BIAS:
        total += tl.load(bias_ptr + top + n, mask=kept, other=0.0).to(tl.float32)[None, :]
        if GATE != NONE:
            up += tl.load(bias_ptr + top + out_features + n, mask=kept, other=0.0).to(tl.float32)[None, :]
    if GATE != NONE:
        total = gated(total, up, limit, alpha, GATE)
    out_at = out_ptr + pair.to(tl.int64)[:, None] * out_features + n[None, :]
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=here & kept[None, :])


def multiply_codes(
    x: Tensor,
    stack: Codes,
    bias: Tensor | None,
    pairs: Pairs,
    per_row: int,
    activation: Activation | None,
    num_experts: int,
    rows: int,
    tile: CodedTile,
    out: Tensor,
) -> None:
    """out [pairs, width]: see experts.multiply. rows: of a block of pairs."""
    all_rows, width = stack.scale.shape[1], out.shape[1]
    assert all_rows == num_experts * width * (1 if activation is None else 2)
    assert x.stride(1) == 1 and x.shape[1] == stack.in_features and stack.codes.shape[0] == all_rows
    block_n, num_warps, num_stages = tile
    tensors, options = given(stack)
    gate, limit, alpha = gate_of(activation)
    _multiply_codes[(pairs.owners.shape[0], triton.cdiv(width, block_n))](
        x,
        *tensors,
        stack.scale if bias is None else bias,
        out,
        pairs.order,
        pairs.owners,
        pairs.count,
        x.stride(0),
        width,
        stack.in_features,
        all_rows,
        limit,
        alpha,
        PER_ROW=per_row,
        SORTED=pairs.is_sorted,
        GATE=gate,
        BIAS=bias is not None,
        # Two matrices' codes at a time, of gate and up.
        UNROLL=unroll(stack, UNROLL if activation is None else UNROLL // 2),
        ROWS=rows,
        BLOCK_N=block_n,
        num_warps=num_warps,
        num_stages=num_stages,
        **options,
        **launch_options(),
    )

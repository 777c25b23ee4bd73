"""Products with weights that stay codes: integers or floats of four or eight bits, with a scale for every few columns.

Called by ops/device_coded.py on CUDA tensors. A program owns a tile of the result and goes along K in the same order
always: codes become numbers in registers, which the model's dtype holds exactly, the tensor cores sum the columns that
share a scale, and the scale is taken to that sum in float32. What is added to the numbers of such columns (`low`) is
taken times the sum of x. The other kernel makes rows of numbers. The references are in ops/device_coded.py.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.ops.triton.pdl import launch_options, overlap

if TYPE_CHECKING:  # which asks for this module late
    from engine.ops.device_coded import Codes

# As the kernels number the forms; the second of two differs in its `low` alone.
INT4, INT8, E4M3, E2M1, PLACES = (tl.constexpr(number) for number in range(5))
NUMBERS = {"int4": 0, "int4 and low": 0, "int8": 1, "int8 and low": 1, "e4m3": 2, "e2m1": 3, "table": 4}
# Pieces of a row whose codes are asked for at once, at most.
UNROLL = 4
# Columns of a piece of a row that is brought back to numbers.
_WIDE = 1024


@triton.jit
def _numbers(codes, table, FORM: tl.constexpr, LOW: tl.constexpr, dtype: tl.constexpr):
    """uint8 -> dtype, exactly but for numbers of a table. Codes of four bits by their bits, two at a time: a conversion
    takes four times that."""
    half: tl.constexpr = dtype == tl.float16
    if FORM == PLACES:  # one line of memory, which stays in L1
        result = tl.load(table + codes).to(dtype)
    elif FORM == E4M3:
        result = codes.to(tl.float8e4nv, bitcast=True).to(dtype)
    elif FORM == INT8:
        result = codes.to(tl.int8, bitcast=True).to(dtype)
    elif dtype == tl.float32:
        if FORM == INT4:
            result = codes.to(tl.float32) - (0.0 if LOW else 8.0)
        else:
            size = (codes & 7).to(tl.int32)
            size = tl.where(size < 2, size * 0x3F000000, (size << 22) + (126 << 23))
            result = (size | ((codes & 8).to(tl.int32) << 28)).to(tl.float32, bitcast=True)
    elif FORM == INT4:
        # Put behind the one of a power of two of which the last place is 1.
        bits = codes.to(tl.int16) | (0x6400 if half else 0x4300)
        above: tl.constexpr = (1024.0 if half else 128.0) + (0.0 if LOW else 8.0)
        result = bits.to(dtype, bitcast=True) - tl.full((1, 1), above, dtype)
    else:
        size = (codes & 7).to(tl.int16)
        if half:
            size = tl.where(size < 2, size * 0x3800, (size << 9) + (14 << 10))
        else:
            size = tl.where(size < 2, size * 0x3F00, (size << 6) + (126 << 7))
        result = (size | ((codes & 8).to(tl.int16) << 12)).to(dtype, bitcast=True)
    return result


@triton.jit
def block_sum(
    total,
    x,
    codes,
    scale_at,
    low_at,
    kept,
    table,
    FORM: tl.constexpr,
    LOW: tl.constexpr,
):
    """total and the products of the columns of one scale."""
    part = tl.dot(x, _numbers(codes, table, FORM, LOW, x.dtype), input_precision="ieee")
    total += part * tl.load(scale_at, mask=kept, other=0.0).to(tl.float32)[None, :]
    if LOW:
        total += tl.sum(x.to(tl.float32), axis=1)[:, None] * tl.load(low_at, mask=kept, other=0.0)[None, :]
    return total


@triton.jit
def _codes(
    x_ptr,
    codes_ptr,
    scale_ptr,
    low_ptr,
    table_ptr,
    bias_ptr,
    out_ptr,
    rows,
    out_features,
    in_features,
    x_stride,
    FORM: tl.constexpr,
    PAIRS: tl.constexpr,
    LOW: tl.constexpr,
    BIAS: tl.constexpr,
    EVERY: tl.constexpr,
    WIDTH: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    overlap(PDL)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, WIDTH)
    kept, here = n < out_features, (m < rows)[:, None]
    x_at = x_ptr + m.to(tl.int64)[:, None] * x_stride + k[None, :]
    # Columns that are not there are others, whose results are not kept.
    bytes_of_row = in_features // 2 if PAIRS else in_features
    codes_at = codes_ptr + (n % out_features).to(tl.int64)[None, :] * bytes_of_row + k[:, None]
    scale_at, low_at = scale_ptr + n, low_ptr + n
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for piece in range(0, bytes_of_row // WIDTH, UNROLL):
        # Loads of several pieces are under way at once: one is 32 bytes a row.
        for each in tl.static_range(UNROLL):
            codes = tl.load(codes_at + (piece + each) * WIDTH, eviction_policy="evict_first")
            if PAIRS:
                first = tl.cast(2 * (piece + each) // EVERY, tl.int64) * out_features
                x = tl.load(x_at, mask=here, other=0.0)
                total = block_sum(total, x, codes & 15, scale_at + first, low_at + first, kept, table_ptr, FORM, LOW)
                first = tl.cast((2 * (piece + each) + 1) // EVERY, tl.int64) * out_features
                x_at += WIDTH
                x = tl.load(x_at, mask=here, other=0.0)
                total = block_sum(total, x, codes >> 4, scale_at + first, low_at + first, kept, table_ptr, FORM, LOW)
            else:
                first = tl.cast((piece + each) // EVERY, tl.int64) * out_features
                x = tl.load(x_at, mask=here, other=0.0)
                total = block_sum(total, x, codes, scale_at + first, low_at + first, kept, table_ptr, FORM, LOW)
            x_at += WIDTH
    if BIAS:
        total += tl.load(bias_ptr + n, mask=kept, other=0.0).to(tl.float32)[None, :]
    out_at = out_ptr + m.to(tl.int64)[:, None] * out_features + n[None, :]
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=here & kept[None, :])


@triton.jit(do_not_specialize=["begin"])
def _widen(
    codes_ptr,
    scale_ptr,
    low_ptr,
    table_ptr,
    ids_ptr,
    out_ptr,
    begin,
    out_features,
    in_features,
    FORM: tl.constexpr,
    PAIRS: tl.constexpr,
    LOW: tl.constexpr,
    PICK: tl.constexpr,
    EVERY: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    PDL: tl.constexpr,
):
    overlap(PDL)
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(ids_ptr + place).to(tl.int64) if PICK else begin + place
    column = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    here = column < in_features
    block = column // WIDTH
    if PAIRS:
        at = row * (in_features // 2) + block // 2 * WIDTH + column % WIDTH
        codes = tl.load(codes_ptr + at, mask=here, other=0)
        codes = tl.where(block % 2 == 1, codes >> 4, codes & 15)
    else:
        codes = tl.load(codes_ptr + row * in_features + column, mask=here, other=0)
    scale_at = (block // EVERY).to(tl.int64) * out_features + row
    scale = tl.load(scale_ptr + scale_at, mask=here, other=0.0).to(tl.float32)
    values = _numbers(codes, table_ptr, FORM, LOW, tl.float32) * scale
    if LOW:
        values += tl.load(low_ptr + scale_at, mask=here, other=0.0)
    tl.store(out_ptr + place * in_features + column, values.to(out_ptr.dtype.element_ty), mask=here)


def coded_product(x: Tensor, weight: Codes, bias: Tensor | None, tile: tuple[int, int, int, int]) -> Tensor:
    """See ops/device_coded.py. tile: rows and columns of the result at a time, warps, loads under way."""
    rows, in_features = x.shape
    out_features = weight.scale.shape[1]
    assert x.stride(1) == 1 and in_features == weight.in_features and weight.codes.shape[0] == out_features
    height, block_n, num_warps, num_stages = tile
    out = torch.empty((rows, out_features), dtype=x.dtype, device=x.device)
    tensors, options = given(weight)
    _codes[(triton.cdiv(out_features, block_n), triton.cdiv(rows, height))](
        x,
        *tensors,
        weight.scale if bias is None else bias,
        out,
        rows,
        out_features,
        in_features,
        x.stride(0),
        BIAS=bias is not None,
        UNROLL=unroll(weight),
        BLOCK_M=height,
        BLOCK_N=block_n,
        num_warps=num_warps,
        num_stages=num_stages,
        **options,
        **launch_options(),
    )
    return out


def widened(
    weight: Codes, dtype: torch.dtype, ids: Tensor | None = None, rows: tuple[int, int] | None = None
) -> Tensor:
    """See ops/device_coded.py, whose `torch_numbers` is the reference. rows: the first, and the one behind the last."""
    in_features, out_features = weight.in_features, weight.scale.shape[1]
    begin, end = rows or (0, out_features)
    count = end - begin if ids is None else len(ids)
    tensors, options = given(weight)
    out = torch.empty((count, in_features), dtype=dtype, device=weight.codes.device)
    if not count:
        return out
    wide = min(_WIDE, triton.next_power_of_2(in_features))
    _widen[(count, triton.cdiv(in_features, wide))](
        *tensors,
        weight.codes if ids is None else ids,
        out,
        begin,
        out_features,
        in_features,
        PICK=ids is not None,
        WIDE=wide,
        num_warps=4,
        **options,
        **launch_options(),
    )
    return out


def given(weight: Codes) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """The tensors of a weight (codes, scale, low, table; another where there is none), and what its form makes of a
    kernel."""
    codes, scale, low, table = weight.codes, weight.scale, weight.low, weight.table
    assert codes.is_contiguous() and scale.is_contiguous()
    options = {
        "FORM": NUMBERS[weight.form],
        "PAIRS": weight.are_paired,
        "LOW": low is not None,
        "EVERY": weight.in_features // weight.width // scale.shape[0],
        "WIDTH": weight.width,
    }
    return (codes, scale, scale if low is None else low, scale if table is None else table), options


def unroll(weight: Codes, at_most: int = UNROLL) -> int:
    """Pieces of a row whose codes are asked for at once; at_most: a power of two."""
    return math.gcd(weight.codes.shape[1] // weight.width, at_most)

"""Attention of single tokens over pages of keys and values: one row, one KV head and one part of the context a program.

A program reads its keys and values once, for all queries of the head, and multiplies on tensor cores; what the parts of
a context have found is put together by a second, small kernel. Neither looks at anything on the host, and the grid
depends on the sizes of the batch and of the page tables alone, so both can be captured in a graph. The reference is
`DeviceAttention.decode_rows`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.groups import Chunk
from engine.ops.triton.pdl import launch_options, overlap

LOG2_E = 1.4426950408889634
# Bytes of a token's key that programs together should be at, for an H100's or H200's memory to be busy.
BUSY = 2**17


class Tile(NamedTuple):
    """Tokens that a program reads at a time, the threads of it in warps, and how many reads are under way."""

    tokens: int = 64
    num_warps: int = 4
    num_stages: int = 3


# Numbers that change from step to step: one kernel for all of them.
@triton.jit(do_not_specialize=["parts", "table_stride"])
def _attend(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    length_ptr,
    sink_ptr,
    out_ptr,
    most_ptr,
    sum_ptr,
    table_stride,
    k_page_stride,
    k_token_stride,
    v_page_stride,
    v_token_stride,
    scale,
    softcap,
    window,
    parts,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLIT: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNKED: tl.constexpr,
    CAPPED: tl.constexpr,
    SINKS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    head, part, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(0)
    overlap(PDL)
    length = tl.load(length_ptr + row)
    lowest = 0
    if WINDOW:
        lowest = tl.maximum(length - window, 0)
    if CHUNKED:
        lowest = (length - 1) // window * window
    first = lowest // TOKENS * TOKENS
    share = tl.cdiv(tl.cdiv(length - first, TOKENS), parts) * TOKENS
    begin = first + part * share
    end = tl.minimum(begin + share, length)
    query = tl.arange(0, ROWS)
    dim, value_dim = tl.arange(0, DIM_BLOCK), tl.arange(0, VALUE_BLOCK)
    own = (row * heads + head) * GROUP + query
    valid = query < GROUP
    q_mask = valid[:, None] & (dim[None, :] < DIM)
    q = tl.load(q_ptr + own[:, None] * DIM + dim[None, :], mask=q_mask, other=0.0)
    most = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    found = tl.zeros((ROWS, VALUE_BLOCK), tl.float32)
    token = tl.arange(0, TOKENS)
    for at in tl.range(begin, end, TOKENS, num_stages=STAGES):
        here = at + token
        seen = (here < end) & (here >= lowest)
        page = tl.load(table_ptr + row * table_stride + here // PAGE, mask=seen, other=0).to(tl.int64)
        k_at = k_ptr + (page * k_page_stride + (here % PAGE) * k_token_stride + head * DIM)[:, None] + dim[None, :]
        v_at = v_ptr + (page * v_page_stride + (here % PAGE) * v_token_stride + head * VALUE_DIM)[:, None]
        keys = tl.load(k_at, mask=seen[:, None] & (dim[None, :] < DIM), other=0.0)
        values = tl.load(v_at + value_dim[None, :], mask=seen[:, None] & (value_dim[None, :] < VALUE_DIM), other=0.0)
        # scale and softcap are in powers of 2, as the exponentials are.
        scores = tl.dot(q, tl.trans(keys.to(q.dtype)), input_precision="ieee") * scale
        if CAPPED:
            # tanh by what the exponential gives; it saturates at both ends, as tanh does.
            scores = softcap * (1.0 - 2.0 / (tl.exp(2.0 * scores / softcap) + 1.0))
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, 1))
        # A part of which nothing is in the window: it may not become a NaN.
        level = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - level[:, None])
        shrink = tl.exp2(most - level)
        total = total * shrink + tl.sum(weights, 1)
        found = found * shrink[:, None] + tl.dot(weights.to(q.dtype), values.to(q.dtype), input_precision="ieee")
        most = higher
    out_mask = valid[:, None] & (value_dim[None, :] < VALUE_DIM)
    if not SPLIT:
        if SINKS:
            sink = tl.load(sink_ptr + head * GROUP + query, mask=valid, other=0.0).to(tl.float32) * 1.4426950408889634
            level = tl.maximum(most, sink)
            shrink = tl.exp2(most - level)
            total = total * shrink + tl.exp2(sink - level)
            found = found * shrink[:, None]
        found = found / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(
            out_ptr + own[:, None] * VALUE_DIM + value_dim[None, :], found.to(out_ptr.dtype.element_ty), mask=out_mask
        )
    else:
        place = own * parts + part
        tl.store(most_ptr + place, most, mask=valid)
        tl.store(sum_ptr + place, total, mask=valid)
        if begin < end:
            tl.store(out_ptr + place[:, None] * VALUE_DIM + value_dim[None, :], found, mask=out_mask)


@triton.jit(do_not_specialize=["parts"])
def _combine(
    part_ptr,
    most_ptr,
    sum_ptr,
    sink_ptr,
    out_ptr,
    heads,
    parts,
    VALUE_DIM: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    PARTS_BLOCK: tl.constexpr,
    SINKS: tl.constexpr,
    PDL: tl.constexpr,
):
    own = tl.program_id(0)
    part, dim = tl.arange(0, PARTS_BLOCK), tl.arange(0, VALUE_BLOCK)
    overlap(PDL)
    most = tl.load(most_ptr + own * parts + part, mask=part < parts, other=float("-inf"))
    total = tl.load(sum_ptr + own * parts + part, mask=part < parts, other=0.0)
    level = tl.max(most, 0)
    if SINKS:
        sink = tl.load(sink_ptr + own % heads).to(tl.float32) * 1.4426950408889634
        level = tl.maximum(level, sink)
    share = tl.exp2(most - level)
    whole = tl.sum(share * total, 0)
    if SINKS:
        whole += tl.exp2(sink - level)
    mask = (most > float("-inf"))[:, None] & (dim[None, :] < VALUE_DIM)
    parts = tl.load(part_ptr + (own * parts + part)[:, None] * VALUE_DIM + dim[None, :], mask=mask, other=0.0)
    result = tl.sum(parts * share[:, None], 0) / whole
    tl.store(out_ptr + own * VALUE_DIM + dim, result.to(out_ptr.dtype.element_ty), mask=dim < VALUE_DIM)


def parts_of(programs: int, tokens: int, most: int, busy: int) -> int:
    """Parts of every context: as many as keep the device busy, and no smaller than a tile of `tokens`.

    programs: rows times KV heads. most: tokens that a row may see. busy: programs that are wanted.
    """
    return max(1, min(busy // programs, -(-most // tokens)))


def tile_of(dim: int, *, widened: bool = False) -> Tile:
    """As was quickest on an H200 for head_dim 64 and 128. widened: of keys and values that are of another type."""
    if dim > 128 and widened:  # registers of a thread hold no more of them, in both types
        return Tile(32, num_stages=2)
    return Tile(num_stages=3 if 64 < dim <= 128 else 2)


def most_parts(kv_heads: int, q: Tensor, tokens: int) -> int:
    """The most that the context of a row of `tokens` is ever in."""
    dim = q.shape[2]
    return parts_of(kv_heads, tile_of(dim).tokens, tokens, BUSY // (dim * q.itemsize))


def decode_attention(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    tables: Tensor,
    kv_len: Tensor,
    scale: float,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
    tile: Tile | None = None,
    parts: int | None = None,
) -> Tensor:
    """q [B, Hq, D] -> [B, Hq, Dv] in its dtype, over the first kv_len tokens of each row's pages.

    k_pool, v_pool [pages, page_size, Hkv, D or Dv], heads and dims contiguous; tables int32 [B, W], kv_len int32 [B].
    window: of tokens that are seen, the row's own among them. sinks [Hq]: a score that gets a weight and has no value.
    """
    rows, num_heads, dim = q.shape
    _, page_size, kv_heads, value_dim = v_pool.shape
    assert k_pool.stride()[2:] == (dim, 1) and v_pool.stride()[2:] == (value_dim, 1)
    assert q.is_contiguous() and tables.stride(1) == 1
    out = torch.empty((rows, num_heads, value_dim), dtype=q.dtype, device=q.device) if out is None else out
    assert out.is_contiguous()
    context = tables.shape[1] * page_size
    tile = tile_of(dim, widened=k_pool.dtype != q.dtype) if tile is None else tile
    if parts is None:
        most = context if window is None else min(context, window + tile.tokens)
        parts = parts_of(rows * kv_heads, tile.tokens, most, BUSY // (dim * q.itemsize))
    found, highest, total = out, out, out
    if parts > 1:
        options = {"dtype": torch.float32, "device": q.device}
        found = torch.empty((rows, num_heads, parts, value_dim), **options)
        highest, total = (torch.empty((rows, num_heads, parts), **options) for _ in range(2))
    value_block = triton.next_power_of_2(value_dim)
    sink = q if sinks is None else sinks
    _attend[(kv_heads, parts, rows)](
        q,
        k_pool,
        v_pool,
        tables,
        kv_len,
        sink,
        found,
        highest,
        total,
        tables.stride(0),
        k_pool.stride(0),
        k_pool.stride(1),
        v_pool.stride(0),
        v_pool.stride(1),
        scale * LOG2_E,
        0.0 if softcap is None else softcap * LOG2_E,
        0 if window is None else window,
        parts,
        GROUP=num_heads // kv_heads,
        ROWS=max(16, triton.next_power_of_2(num_heads // kv_heads)),
        DIM=dim,
        DIM_BLOCK=max(16, triton.next_power_of_2(dim)),
        VALUE_DIM=value_dim,
        VALUE_BLOCK=max(16, value_block),
        PAGE=page_size,
        TOKENS=tile.tokens,
        SPLIT=parts > 1,
        WINDOW=window is not None and not isinstance(window, Chunk),
        CHUNKED=isinstance(window, Chunk),
        CAPPED=softcap is not None,
        SINKS=sinks is not None,
        STAGES=tile.num_stages,
        num_warps=tile.num_warps,
        **launch_options(),
    )
    if parts > 1:
        parts_block = triton.next_power_of_2(parts)
        _combine[(rows * num_heads,)](
            found,
            highest,
            total,
            sink,
            out,
            num_heads,
            parts,
            VALUE_DIM=value_dim,
            VALUE_BLOCK=value_block,
            PARTS_BLOCK=parts_block,
            SINKS=sinks is not None,
            # One KV head's long context is in hundreds of parts, which all are a thread's at once.
            num_warps=min(16, max(4, parts_block * value_block // 2048)),
            **launch_options(),
        )
    return out

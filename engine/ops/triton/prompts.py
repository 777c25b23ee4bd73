"""Attention of prompts over pages of keys and values: one row, one KV head and one tile of its queries a program.

The queries of all heads that read a KV head are packed into a tile, token by token, so that what is read of a key
serves them all. A program goes from the lowest key that its first query sees to the last that its last query sees, on
tensor cores, and finds its row's place by arrays on the device: it looks at nothing on the host but the length of the
longest row, which the grid depends on. The reference is `DeviceAttention.torch_prefill_rows`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.groups import Chunk
from engine.ops.triton.attention import LOG2_E
from engine.ops.triton.pdl import launch_options, overlap

# Programs that fill an H100 or H200, one a multiprocessor.
BUSY = 132
# Queries of a tile.
SMALL, LARGE = 64, 128


class Tile(NamedTuple):
    """Queries (tokens times heads) of a program, keys that it reads at a time, its warps, and reads under way."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


@triton.jit
def _go_on(
    q,
    k_ptr,
    v_ptr,
    indices_ptr,
    k_page_stride,
    k_token_stride,
    v_page_stride,
    v_token_stride,
    scale,
    softcap,
    begin,
    end,
    lowest,
    position,
    most,
    total,
    found,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    KEYS: tl.constexpr,
    LIMITED: tl.constexpr,
    CAPPED: tl.constexpr,
    MASKED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The keys from begin to end, the last of which may be within a tile. lowest, position: the first and the last that
    each query sees, where MASKED; else every query sees all of them, and they are whole tiles."""
    key = tl.arange(0, KEYS)
    dim, value_dim = tl.arange(0, DIM_BLOCK), tl.arange(0, VALUE_BLOCK)
    for at in tl.range(begin, end, KEYS, num_stages=STAGES):
        here = at + key
        if MASKED:
            there = here < end
            page = tl.load(indices_ptr + here // PAGE, mask=there, other=0).to(tl.int64)
        else:
            page = tl.load(indices_ptr + here // PAGE).to(tl.int64)
        k_at = k_ptr + (page * k_page_stride + (here % PAGE) * k_token_stride)[:, None] + dim[None, :]
        v_at = v_ptr + (page * v_page_stride + (here % PAGE) * v_token_stride)[:, None] + value_dim[None, :]
        # Behind the last key a page holds what others left there, which may be NaN: a weight of 0 is not enough.
        if MASKED:
            keys = tl.load(k_at, mask=there[:, None] & (dim[None, :] < DIM), other=0.0)
            values = tl.load(v_at, mask=there[:, None] & (value_dim[None, :] < VALUE_DIM), other=0.0)
        else:
            keys = tl.load(k_at, mask=dim[None, :] < DIM, other=0.0) if DIM < DIM_BLOCK else tl.load(k_at)
            if VALUE_DIM < VALUE_BLOCK:
                values = tl.load(v_at, mask=value_dim[None, :] < VALUE_DIM, other=0.0)
            else:
                values = tl.load(v_at)
        scores = tl.dot(q, tl.trans(keys.to(q.dtype)), input_precision="ieee")
        # In powers of 2, as the exponentials are; without a cap the scale is taken together with what is subtracted.
        unit = scale
        if CAPPED:
            # tanh by what the exponential gives; it saturates at both ends, as tanh does.
            scores = softcap * (1.0 - 2.0 / (tl.exp(2.0 * scale * scores / softcap) + 1.0))
            unit = 1.0
        if MASKED:
            seen = here[None, :] <= position[:, None]
            if LIMITED:
                seen = seen & (here[None, :] >= lowest[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, 1) * unit)
        # Queries whose window begins later have seen nothing yet: that may not become a NaN.
        level = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores * unit - level[:, None])
        shrink = tl.exp2(most - level)
        total = total * shrink + tl.sum(weights, 1)
        found = found * shrink[:, None]
        found = tl.dot(weights.to(q.dtype), values.to(q.dtype), found, input_precision="ieee")
        most = higher
    return most, total, found


@triton.jit
def _attend_prompts(
    q_ptr,
    k_ptr,
    v_ptr,
    qo_indptr_ptr,
    kv_indptr_ptr,
    indices_ptr,
    length_ptr,
    sink_ptr,
    out_ptr,
    k_page_stride,
    k_token_stride,
    v_page_stride,
    v_token_stride,
    scale,
    softcap,
    window,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNKED: tl.constexpr,
    CAPPED: tl.constexpr,
    SINKS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    head, row = tl.program_id(0), tl.program_id(2)
    heads = tl.num_programs(0)
    # Those that see most begin first, so that the device does not wait for them at the end.
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    overlap(PDL)
    start = tl.load(qo_indptr_ptr + row)
    count = tl.load(qo_indptr_ptr + row + 1) - start
    if tile * ROWS >= count * GROUP:
        return
    length = tl.load(length_ptr + row)
    query = tile * ROWS + tl.arange(0, ROWS)
    valid = query < count * GROUP
    token, member = query // GROUP, query % GROUP
    own = ((start + token).to(tl.int64) * heads + head) * GROUP + member
    dim, value_dim = tl.arange(0, DIM_BLOCK), tl.arange(0, VALUE_BLOCK)
    q = tl.load(q_ptr + own[:, None] * DIM + dim[None, :], mask=valid[:, None] & (dim[None, :] < DIM), other=0.0)
    # What is behind the last query sees what that sees.
    before = length - count
    position = before + tl.minimum(token, count - 1)
    top = before + tile * ROWS // GROUP
    end = before + tl.minimum((tile * ROWS + ROWS - 1) // GROUP, count - 1) + 1
    lowest = tl.zeros_like(position)
    bottom = 0
    if WINDOW:
        lowest = tl.maximum(position - window + 1, 0)
        bottom = tl.maximum(top - window + 1, 0)
    if CHUNKED:
        lowest = position // window * window
        bottom = top // window * window
    most = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    found = tl.zeros((ROWS, VALUE_BLOCK), tl.float32)
    indices_ptr += tl.load(kv_indptr_ptr + row)
    k_ptr += head * DIM
    v_ptr += head * VALUE_DIM
    LIMITED: tl.constexpr = WINDOW or CHUNKED
    if not LIMITED:
        # Keys before the first query are seen by all, and need no mask.
        bottom = (top + 1) // KEYS * KEYS
        most, total, found = _go_on(
            q,
            k_ptr,
            v_ptr,
            indices_ptr,
            k_page_stride,
            k_token_stride,
            v_page_stride,
            v_token_stride,
            scale,
            softcap,
            0,
            bottom,
            lowest,
            position,
            most,
            total,
            found,
            DIM,
            DIM_BLOCK,
            VALUE_DIM,
            VALUE_BLOCK,
            PAGE,
            KEYS,
            LIMITED,
            CAPPED,
            False,
            STAGES,
        )
    most, total, found = _go_on(
        q,
        k_ptr,
        v_ptr,
        indices_ptr,
        k_page_stride,
        k_token_stride,
        v_page_stride,
        v_token_stride,
        scale,
        softcap,
        bottom,
        end,
        lowest,
        position,
        most,
        total,
        found,
        DIM,
        DIM_BLOCK,
        VALUE_DIM,
        VALUE_BLOCK,
        PAGE,
        KEYS,
        LIMITED,
        CAPPED,
        True,
        STAGES,
    )
    if SINKS:
        sink = tl.load(sink_ptr + head * GROUP + member).to(tl.float32) * 1.4426950408889634
        level = tl.maximum(most, sink)
        shrink = tl.exp2(most - level)
        total = total * shrink + tl.exp2(sink - level)
        found = found * shrink[:, None]
    found = found / total[:, None]
    out_mask = valid[:, None] & (value_dim[None, :] < VALUE_DIM)
    out_at = out_ptr + own[:, None] * VALUE_DIM + value_dim[None, :]
    tl.store(out_at, found.to(out_ptr.dtype.element_ty), mask=out_mask)


def queries_of(queries: int, others: int) -> int:
    """Tiles of 128 queries read least; of 64 where there would be too few, or half of one would be empty.

    queries: tokens times heads of a KV head, of the longest row. others: rows times KV heads, so many programs there
    are for each tile of theirs.
    """
    return SMALL if queries <= SMALL or -(-queries // LARGE) * others < BUSY else LARGE


def tile_of(dim: int, dtype: torch.dtype, kv_dtype: torch.dtype, queries: int) -> Tile:
    """dim: the larger of a key's and a value's. queries: SMALL or LARGE."""
    if dtype == torch.float32:  # without tensor cores, and for comparison alone
        return Tile(16, 16, 4, 1)
    few = queries == SMALL
    if dim <= 128:
        return Tile(64, 64, 4, 3) if few else Tile(128, 64, 8, 3)
    # Of sums alone a thread has 64 and 128 registers: four warps would not hold the first, nor would there be room for
    # more keys beside the second, or for any that are widened.
    return Tile(64, 32, 8, 3) if few or kv_dtype != dtype else Tile(128, 32, 8, 3)


def prompt_attention(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    qo_indptr: Tensor,
    kv_indptr: Tensor,
    kv_indices: Tensor,
    kv_len: Tensor,
    scale: float,
    *,
    max_len: int,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
    most: int = LARGE,
    tile: Tile | None = None,
) -> Tensor:
    """q [T, Hq, D] -> [T, Hq, Dv] in its dtype. Row r has q[qo_indptr[r] : qo_indptr[r + 1]]: the last of its
    kv_len[r] tokens, which are in the pages kv_indices[kv_indptr[r] :].

    k_pool, v_pool [pages, page_size, Hkv, D or Dv], heads and dims contiguous; qo_indptr, kv_indptr int32 [R + 1],
    kv_len int32 [R]. max_len: new tokens of the longest row. window: of tokens that a query sees, its own among them.
    sinks [Hq]: a score that gets a weight and has no value. most: queries of the largest tile that this GPU has room
    for, SMALL or LARGE.
    """
    tokens, num_heads, dim = q.shape
    _, page_size, kv_heads, value_dim = v_pool.shape
    assert k_pool.stride()[2:] == (dim, 1) and v_pool.stride()[2:] == (value_dim, 1)
    assert q.is_contiguous() and scale > 0
    out = torch.empty((tokens, num_heads, value_dim), dtype=q.dtype, device=q.device) if out is None else out
    assert out.is_contiguous()
    rows, group = len(kv_len), num_heads // kv_heads
    if tile is None:
        queries = min(most, queries_of(max_len * group, rows * kv_heads))
        tile = tile_of(max(dim, value_dim), q.dtype, k_pool.dtype, queries)
    _attend_prompts[(kv_heads, triton.cdiv(max_len * group, tile.rows), rows)](
        q,
        k_pool,
        v_pool,
        qo_indptr,
        kv_indptr,
        kv_indices,
        kv_len,
        q if sinks is None else sinks,
        out,
        k_pool.stride(0),
        k_pool.stride(1),
        v_pool.stride(0),
        v_pool.stride(1),
        scale * LOG2_E,
        0.0 if softcap is None else softcap * LOG2_E,
        0 if window is None else window,
        GROUP=group,
        ROWS=tile.rows,
        DIM=dim,
        DIM_BLOCK=max(16, triton.next_power_of_2(dim)),
        VALUE_DIM=value_dim,
        VALUE_BLOCK=max(16, triton.next_power_of_2(value_dim)),
        PAGE=page_size,
        KEYS=tile.keys,
        WINDOW=window is not None and not isinstance(window, Chunk),
        CHUNKED=isinstance(window, Chunk),
        CAPPED=softcap is not None,
        SINKS=sinks is not None,
        STAGES=tile.num_stages,
        num_warps=tile.num_warps,
        **launch_options(),
    )
    return out

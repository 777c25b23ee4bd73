"""y += gain y + offset + B (A x) of LoRA adapters in two launches: A of every row's adapter, then the rest; before them
outputs of an adapter's own, where a layer may have some; and rows of embeddings in one. Called by ops/lora_device.py on
CUDA tensors; `torch_add` and `torch_look_up` there are the reference.

A program computes the rows of one block, which have one adapter, so that its matrices are read once for all of them.
Blocks of nobody, and ranks that an adapter has not, end at once. A is summed in parts of the inputs, each in their
order and then one after the other, cut by the layer's size alone: a row has the same bits in any company.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.ops.triton.pdl import launch_options, overlap

# Parts of the inputs, at most so many and at least so long; each is a program's where there are few blocks.
MOST_SPLITS, LEAST_SPLIT = 8, 512
FEW_BLOCKS = 32
BLOCK_K_BYTES = 256
# Kernels are not compiled anew for a 1 or a multiple of 16 of these, amid serving.
CHANGING = ("rows", "number")
# Token ids that are compared at once.
SEARCHED = 64


@triton.jit(do_not_specialize=CHANGING)
def _shrink(
    x_ptr,
    memory_ptr,
    table_ptr,
    order_ptr,
    owners_ptr,
    inner_ptr,
    rows,
    x_stride,
    in_features,
    stride,
    sites,
    number,
    RANKS: tl.constexpr,
    PARTS: tl.constexpr,
    SPLIT: tl.constexpr,
    TOGETHER: tl.constexpr,
    PER_ROW: tl.constexpr,
    FIELDS: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """inner[split, position in order, part, rank]: one split by each program, or all added up TOGETHER. EXPERTS: where
    rows are pairs of a token and one of so many experts, PER_ROW of a row of x."""
    overlap(PDL)
    block = tl.program_id(0)
    owner = tl.load(owners_ptr + block).to(tl.int64)
    if EXPERTS > 0:
        number += tl.maximum(owner, 0) % EXPERTS
        owner = tl.where(owner < 0, 0, owner // EXPERTS + 1)
    part = tl.program_id(1) // (RANKS // UNIT)
    first = tl.program_id(1) % (RANKS // UNIT) * UNIT
    if owner <= 0:
        return
    place = table_ptr + (owner * sites + number) * FIELDS
    begin, rank = tl.load(place).to(tl.int64) * UNIT, tl.load(place + 1)
    if first >= rank:
        return
    rank = tl.multiple_of(rank, UNIT)
    at = tl.multiple_of((owner - 1) * stride + begin, UNIT)
    place_in_block = tl.arange(0, ROWS)
    row = tl.load(order_ptr + block * ROWS + place_in_block)
    valid = row < rows
    number_of = first + tl.arange(0, UNIT)
    k = tl.arange(0, BLOCK_K)
    x_at = x_ptr + (row // PER_ROW).to(tl.int64)[:, None] * x_stride + k[None, :]
    down_at = memory_ptr + at + (part * rank + number_of).to(tl.int64)[None, :] * in_features + k[:, None]
    split = tl.program_id(2)
    total = tl.zeros((ROWS, UNIT), tl.float32)
    begin_split, end_split = split, split + 1
    if TOGETHER:
        end_split = tl.cdiv(in_features, SPLIT)
    for each in range(begin_split, end_split):
        own = tl.zeros((ROWS, UNIT), tl.float32)
        for start in range(each * SPLIT, min((each + 1) * SPLIT, in_features), BLOCK_K):
            left = k < in_features - start
            x = tl.load(x_at + start, mask=valid[:, None] & left[None, :], other=0.0)
            down = tl.load(down_at + start, mask=left[:, None], other=0.0).to(x.dtype)
            own = tl.dot(x, down, own, input_precision="ieee")
        total += own
    position = (split * tl.num_programs(0) + block).to(tl.int64) * ROWS + place_in_block
    inner_at = inner_ptr + position[:, None] * (PARTS * RANKS) + part * RANKS + number_of[None, :]
    tl.store(inner_at, total)


@triton.jit(do_not_specialize=CHANGING)
def _expand(
    y_ptr,
    memory_ptr,
    words_ptr,
    table_ptr,
    order_ptr,
    owners_ptr,
    inner_ptr,
    tiles_ptr,
    rows,
    y_stride,
    in_features,
    out_features,
    stride,
    sites,
    number,
    RANKS: tl.constexpr,
    PARTS: tl.constexpr,
    SPLITS: tl.constexpr,
    ALIGNED: tl.constexpr,
    HALVES: tl.constexpr,
    FIELDS: tl.constexpr,
    EXPERTS: tl.constexpr,
    WORDS: tl.constexpr,
    ROWS: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    overlap(PDL)
    block = tl.program_id(0)
    owner = tl.load(owners_ptr + block).to(tl.int64)
    if EXPERTS > 0:
        number += tl.maximum(owner, 0) % EXPERTS
        owner = tl.where(owner < 0, 0, owner // EXPERTS + 1)
    if owner <= 0:
        return
    place = table_ptr + (owner * sites + number) * FIELDS
    begin, rank, beside = tl.load(place).to(tl.int64), tl.load(place + 1), tl.load(place + 2).to(tl.int64)
    if (rank == 0) & (beside == 0):
        return
    behind = tl.cdiv((PARTS * rank).to(tl.int64) * in_features, UNIT)
    at = tl.multiple_of((owner - 1) * stride + (begin + behind) * UNIT, UNIT)
    tile = tiles_ptr + tl.program_id(1) * 3
    part, first, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    if ALIGNED:
        first = tl.multiple_of(first, UNIT)
    n = first + tl.arange(0, BLOCK_N)
    inside = (n < end)[None, :]
    place_in_block = tl.arange(0, ROWS)
    row = tl.load(order_ptr + block * ROWS + place_in_block)
    rank_of = tl.arange(0, UNIT)
    position = (block * ROWS + place_in_block).to(tl.int64)
    inner_at = inner_ptr + position[:, None] * (PARTS * RANKS) + part * RANKS + rank_of[None, :]
    up_at = memory_ptr + at + rank_of.to(tl.int64)[:, None] * out_features + n[None, :]
    step = tl.num_programs(0).to(tl.int64) * ROWS * PARTS * RANKS
    added = tl.zeros((ROWS, BLOCK_N), tl.float32)
    for start in range(0, rank, UNIT):
        inner = tl.load(inner_at + start)
        for split in tl.static_range(1, SPLITS):
            inner += tl.load(inner_at + split * step + start)
        up = tl.load(up_at + tl.cast(start, tl.int64) * out_features, mask=inside, other=0.0)
        if HALVES:
            # float32 in two numbers of the narrow type: products on tensor cores, and hardly a bit is lost.
            high = inner.to(up.dtype)
            low = (inner - high.to(tl.float32)).to(up.dtype)
            added = tl.dot(high, up, added)
            added = tl.dot(low, up, added)
        else:
            added = tl.dot(inner, up.to(tl.float32), added, input_precision="ieee")
    y_at = y_ptr + row.to(tl.int64)[:, None] * y_stride + n[None, :]
    mask = (row < rows)[:, None] & inside
    before = tl.load(y_at, mask=mask, other=0.0).to(tl.float32)
    if beside > 0:
        gain_at = words_ptr + ((owner - 1) * stride + beside * UNIT) // WORDS + n
        gain = tl.load(gain_at, mask=n < end, other=0).to(tl.float32, bitcast=True)
        offset = tl.load(gain_at + out_features, mask=n < end, other=0).to(tl.float32, bitcast=True)
        added += gain[None, :] * before + offset[None, :]
    tl.store(y_at, (before + added).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=CHANGING)
def _replace(
    x_ptr,
    y_ptr,
    memory_ptr,
    words_ptr,
    table_ptr,
    order_ptr,
    owners_ptr,
    rows,
    x_stride,
    y_stride,
    in_features,
    stride,
    sites,
    number,
    FIELDS: tl.constexpr,
    WORDS: tl.constexpr,
    ROWS: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """Columns of y are what an adapter's own matrix and bias make of x."""
    overlap(PDL)
    block = tl.program_id(0)
    owner = tl.load(owners_ptr + block).to(tl.int64)
    if owner <= 0:
        return
    place = table_ptr + (owner * sites + number) * FIELDS
    own, count = tl.load(place + 3).to(tl.int64), tl.load(place + 4)
    if tl.program_id(1) * BLOCK_N >= count:
        return
    at = tl.multiple_of((owner - 1) * stride + own * UNIT, UNIT)
    behind = tl.cdiv(count.to(tl.int64) * WORDS, UNIT) * UNIT
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < count
    place_in_block = tl.arange(0, ROWS)
    row = tl.load(order_ptr + block * ROWS + place_in_block)
    valid = row < rows
    k = tl.arange(0, BLOCK_K)
    x_at = x_ptr + row.to(tl.int64)[:, None] * x_stride + k[None, :]
    weight_at = memory_ptr + at + 2 * behind + n.to(tl.int64)[None, :] * in_features + k[:, None]
    total = tl.zeros((ROWS, BLOCK_N), tl.float32)
    for start in range(0, in_features, BLOCK_K):
        left = k < in_features - start
        x = tl.load(x_at + start, mask=valid[:, None] & left[None, :], other=0.0)
        weight = tl.load(weight_at + start, mask=inside[None, :] & left[:, None], other=0.0).to(x.dtype)
        total = tl.dot(x, weight, total, input_precision="ieee")
    total += tl.load(words_ptr + (at + behind) // WORDS + n, mask=inside, other=0).to(tl.float32, bitcast=True)[None, :]
    column = tl.load(words_ptr + at // WORDS + n, mask=inside, other=0)
    y_at = y_ptr + row.to(tl.int64)[:, None] * y_stride + column[None, :]
    tl.store(y_at, total.to(y_ptr.dtype.element_ty), mask=valid[:, None] & inside[None, :])


@triton.jit(do_not_specialize=CHANGING)
def _look_up(
    ids_ptr,
    y_ptr,
    memory_ptr,
    words_ptr,
    table_ptr,
    order_ptr,
    owners_ptr,
    rows,
    y_stride,
    tokens,
    out_features,
    stride,
    sites,
    number,
    FIELDS: tl.constexpr,
    WORDS: tl.constexpr,
    ROWS: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SEARCHED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Rows of y, of token ids: an adapter's own where it has them, and the token's row of A times B."""
    overlap(PDL)
    block = tl.program_id(0)
    owner = tl.load(owners_ptr + block).to(tl.int64)
    if owner <= 0:
        return
    place = table_ptr + (owner * sites + number) * FIELDS
    begin, rank = tl.load(place).to(tl.int64) * UNIT, tl.load(place + 1)
    own, count = tl.load(place + 3).to(tl.int64) * UNIT, tl.load(place + 4)
    if (rank == 0) & (count == 0):
        return
    line = (owner - 1) * stride
    place_in_block = tl.arange(0, ROWS)
    row = tl.load(order_ptr + block * ROWS + place_in_block)
    valid = row < rows
    token = tl.load(ids_ptr + row, mask=valid, other=0).to(tl.int32)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (n < out_features)[None, :]
    found = token
    if count < tokens:
        found = tl.full((ROWS,), -1, tl.int32)
        each = tl.arange(0, SEARCHED)
        for start in range(0, count, SEARCHED):
            listed = tl.load(words_ptr + (line + own) // WORDS + start + each, mask=start + each < count, other=-1)
            same = token[:, None] == listed[None, :]
            found = tl.maximum(found, tl.max(tl.where(same, start + each[None, :], -1), axis=1))
    y_at = y_ptr + row.to(tl.int64)[:, None] * y_stride + n[None, :]
    mask = valid[:, None] & inside
    before = tl.load(y_at, mask=mask, other=0.0)
    at = line + own + tl.cdiv(count.to(tl.int64) * WORDS, UNIT) * UNIT
    mine = (found >= 0)[:, None]
    own_at = memory_ptr + at + found.to(tl.int64)[:, None] * out_features + n[None, :]
    own_rows = tl.load(own_at, mask=mask & mine, other=0.0).to(before.dtype)
    before = tl.where(mine, own_rows, before)
    up_at = memory_ptr + line + begin + tl.cdiv(rank.to(tl.int64) * tokens, UNIT) * UNIT
    added = tl.zeros((ROWS, BLOCK_N), tl.float32)
    for start in range(0, rank, UNIT):
        rank_of = start + tl.arange(0, UNIT)
        down_at = memory_ptr + line + begin + token.to(tl.int64)[:, None] * rank + rank_of[None, :]
        down = tl.load(down_at, mask=valid[:, None], other=0.0)
        up = tl.load(up_at + rank_of.to(tl.int64)[:, None] * out_features + n[None, :], mask=inside, other=0.0)
        added = tl.dot(down, up, added, input_precision="ieee")
    tl.store(y_at, (before.to(tl.float32) + added).to(y_ptr.dtype.element_ty), mask=mask)


def replace(
    x: Tensor,
    y: Tensor,
    memory: Tensor,
    table: Tensor,
    order: Tensor,
    owners: Tensor,
    *,
    number: int,
    fields: int,
    unit: int,
    width: int,
) -> None:
    """Outputs of adapters' own, before `add`. width: outputs of a program."""
    blocks = len(owners)
    if not blocks:
        return
    x = x if x.stride(1) == 1 else x.contiguous()
    assert y.stride(1) == 1
    _replace[(blocks, triton.cdiv(y.shape[1], width))](
        x,
        y,
        memory,
        memory.view(torch.int32),
        table,
        order,
        owners,
        len(x),
        x.stride(0),
        y.stride(0),
        x.shape[1],
        memory.stride(0),
        table.shape[1] // fields,
        number,
        FIELDS=fields,
        WORDS=4 // memory.dtype.itemsize,
        ROWS=len(order) // blocks,
        UNIT=unit,
        BLOCK_N=width,
        BLOCK_K=BLOCK_K_BYTES // x.dtype.itemsize,
        num_warps=4,
        num_stages=3,
        **launch_options(),
    )


def look_up(
    ids: Tensor,
    y: Tensor,
    memory: Tensor,
    table: Tensor,
    order: Tensor,
    owners: Tensor,
    *,
    number: int,
    tokens: int,
    fields: int,
    unit: int,
    width: int,
) -> None:
    """See DeviceSite.look_up. tokens: of the vocabulary."""
    blocks = len(owners)
    if not blocks:
        return
    assert y.stride(1) == 1 and ids.stride(0) == 1
    _look_up[(blocks, triton.cdiv(y.shape[1], width))](
        ids,
        y,
        memory,
        memory.view(torch.int32),
        table,
        order,
        owners,
        len(ids),
        y.stride(0),
        tokens,
        y.shape[1],
        memory.stride(0),
        table.shape[1] // fields,
        number,
        FIELDS=fields,
        WORDS=4 // memory.dtype.itemsize,
        ROWS=len(order) // blocks,
        UNIT=unit,
        BLOCK_N=width,
        SEARCHED=SEARCHED,
        num_warps=4,
        **launch_options(),
    )


def add(
    x: Tensor,
    y: Tensor,
    memory: Tensor,
    table: Tensor,
    order: Tensor,
    owners: Tensor,
    tiles: Tensor,
    *,
    number: int,
    parts: int,
    ranks: int,
    fields: int,
    unit: int,
    width: int,
    aligned: bool,
    halves: bool | None = None,
    experts: int = 0,
    per_row: int = 1,
) -> None:
    """See DeviceSite.add, and add_pairs where there are experts. number: of the site. ranks: of a part, at most. width:
    most outputs of a tile; aligned: they begin on multiples of `unit`. halves: for tests."""
    blocks, in_features, (count, out_features) = len(owners), x.shape[1], y.shape
    if not blocks:
        return
    rows, sites = len(order) // blocks, table.shape[1] // fields
    x = x if x.stride(1) == 1 else x.contiguous()
    assert y.stride(1) == 1 and count == len(x) * per_row and ranks % unit == 0
    split = max(LEAST_SPLIT, triton.next_power_of_2(triton.cdiv(in_features, MOST_SPLITS)))
    together = blocks > FEW_BLOCKS
    splits = 1 if together else triton.cdiv(in_features, split)
    inner = torch.empty((splits, blocks * rows, parts * ranks), dtype=torch.float32, device=x.device)
    _shrink[(blocks, parts * ranks // unit, splits)](
        x,
        memory,
        table,
        order,
        owners,
        inner,
        count,
        x.stride(0),
        in_features,
        memory.stride(0),
        sites,
        number,
        RANKS=ranks,
        PARTS=parts,
        SPLIT=split,
        TOGETHER=together,
        PER_ROW=per_row,
        FIELDS=fields,
        EXPERTS=experts,
        ROWS=rows,
        UNIT=unit,
        BLOCK_K=BLOCK_K_BYTES // x.dtype.itemsize,
        num_warps=4,
        num_stages=3,
        **launch_options(),
    )
    _expand[(blocks, len(tiles))](
        y,
        memory,
        memory.view(torch.int32),
        table,
        order,
        owners,
        inner,
        tiles,
        count,
        y.stride(0),
        in_features,
        out_features,
        memory.stride(0),
        sites,
        number,
        RANKS=ranks,
        PARTS=parts,
        SPLITS=splits,
        ALIGNED=aligned,
        HALVES=memory.dtype == torch.bfloat16 if halves is None else halves,
        FIELDS=fields,
        EXPERTS=experts,
        WORDS=4 // memory.dtype.itemsize,
        ROWS=rows,
        UNIT=unit,
        BLOCK_N=width,
        num_warps=4,
        **launch_options(),
    )

"""What a decode step needs before its forward, in two launches instead of fourteen: page-table diffs, then per row its
token, cell, length and page table. Called by ops/attention/device.py, whose `decode_inputs` in torch is the reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256


@triton.jit
def _apply_diffs(table_ptr, index_ptr, page_ptr, count, BLOCK: tl.constexpr):
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = entry < count
    index = tl.load(index_ptr + entry, mask=mask, other=0)
    tl.store(table_ptr + index, tl.load(page_ptr + entry, mask=mask, other=0), mask=mask)


@triton.jit
def _gather(
    table_ptr,
    last_token_ptr,
    row_slot_ptr,
    row_start_ptr,
    slots_ptr,
    token_ids_ptr,
    kv_len_ptr,
    kv_slots_ptr,
    tables_ptr,
    stride,
    width,
    page_size,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    slot = tl.load(row_slot_ptr + row).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    pages = tl.load(table_ptr + slot * stride + column, mask=mask, other=0)
    tl.store(tables_ptr + row * width + column, pages, mask=mask)
    if tl.program_id(1) == 0:
        start = tl.load(row_start_ptr + row)
        page = tl.load(table_ptr + slot * stride + start // page_size).to(tl.int64)
        tl.store(slots_ptr + row, slot)
        tl.store(token_ids_ptr + row, tl.load(last_token_ptr + slot))
        tl.store(kv_len_ptr + row, start + 1)
        tl.store(kv_slots_ptr + row, page * page_size + start % page_size)


def prepare(
    page_table: Tensor,
    last_token: Tensor,
    row_slot: Tensor,
    row_start: Tensor,
    table_index: Tensor,
    table_page: Tensor,
    width: int,
    page_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `decode_inputs`; returns slots, token_ids, kv_len, kv_slots, tables."""
    rows, device = row_slot.shape[0], row_slot.device
    count = table_index.shape[0]
    if count:
        _apply_diffs[(triton.cdiv(count, BLOCK),)](page_table, table_index, table_page, count, BLOCK=BLOCK)
    slots = torch.empty(rows, dtype=torch.int64, device=device)
    kv_slots = torch.empty(rows, dtype=torch.int64, device=device)
    token_ids = torch.empty(rows, dtype=torch.int32, device=device)
    kv_len = torch.empty(rows, dtype=torch.int32, device=device)
    tables = torch.empty((rows, width), dtype=torch.int32, device=device)
    _gather[(rows, triton.cdiv(width, BLOCK))](
        page_table,
        last_token,
        row_slot,
        row_start,
        slots,
        token_ids,
        kv_len,
        kv_slots,
        tables,
        page_table.stride(0),
        width,
        page_size,
        BLOCK=BLOCK,
    )
    return slots, token_ids, kv_len, kv_slots, tables

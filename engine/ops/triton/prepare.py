"""What a decode step needs before its forward, in one launch instead of fourteen: page-table diffs, then per row its
token, cell, length and page table. Called by ops/attention/device.py, whose `decode_inputs` in torch is the reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.ops.triton.pdl import launch_options, overlap

BLOCK = 256


@triton.jit
def _prepare(
    table_ptr,
    last_token_ptr,
    row_slot_ptr,
    row_start_ptr,
    index_ptr,
    page_ptr,
    token_ids_ptr,
    kv_len_ptr,
    kv_slots_ptr,
    tables_ptr,
    num_diffs,
    stride,
    width,
    page_size,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    overlap(PDL)
    # Every program applies all diffs, for none can wait for another: they write the same to the same places.
    for first in range(0, num_diffs, BLOCK):
        entry = first + tl.arange(0, BLOCK)
        given = entry < num_diffs
        index = tl.load(index_ptr + entry, mask=given, other=0)
        tl.store(table_ptr + index, tl.load(page_ptr + entry, mask=given, other=0), mask=given)
    tl.debug_barrier()  # an entry is read by another thread than the one that wrote it
    row = tl.program_id(0)
    slot = tl.load(row_slot_ptr + row).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    pages = tl.load(table_ptr + slot * stride + column, mask=mask, other=0)
    tl.store(tables_ptr + row * width + column, pages, mask=mask)
    if tl.program_id(1) == 0:
        start = tl.load(row_start_ptr + row)
        page = tl.load(table_ptr + slot * stride + start // page_size)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `decode_inputs`; returns token_ids, kv_len, kv_slots, tables."""
    rows, device = row_slot.shape[0], row_slot.device
    kv_slots = torch.empty(rows, dtype=torch.int32, device=device)
    token_ids = torch.empty(rows, dtype=torch.int32, device=device)
    kv_len = torch.empty(rows, dtype=torch.int32, device=device)
    tables = torch.empty((rows, width), dtype=torch.int32, device=device)
    _prepare[(rows, triton.cdiv(width, BLOCK))](
        page_table,
        last_token,
        row_slot,
        row_start,
        table_index,
        table_page,
        token_ids,
        kv_len,
        kv_slots,
        tables,
        table_index.shape[0],
        page_table.stride(0),
        width,
        page_size,
        BLOCK=BLOCK,
        **launch_options(),
    )
    return token_ids, kv_len, kv_slots, tables

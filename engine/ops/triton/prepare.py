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
    given_ptr,
    num_diffs,
    group_stride,
    stride,
    width,
    tables_stride,
    slots_stride,
    page_size,
    GIVEN: tl.constexpr,
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
    row, group = tl.program_id(0), tl.program_id(2).to(tl.int64)
    table_ptr += group * group_stride
    slot = tl.load(row_slot_ptr + row).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    pages = tl.load(table_ptr + slot * stride + column, mask=mask, other=0)
    tl.store(tables_ptr + group * tables_stride + row * width + column, pages, mask=mask)
    if tl.program_id(1) == 0:
        start = tl.load(row_start_ptr + row)
        page = tl.load(table_ptr + slot * stride + start // page_size)
        # The same from every group.
        token = tl.load(last_token_ptr + slot)
        if GIVEN:
            given = tl.load(given_ptr + row)
            token = tl.where(given >= 0, given, token)
        tl.store(token_ids_ptr + row, token)
        tl.store(kv_len_ptr + row, start + 1)
        tl.store(kv_slots_ptr + group * slots_stride + row, page * page_size + start % page_size)


def prepare(
    page_tables: Tensor,
    last_token: Tensor,
    row_slot: Tensor,
    row_start: Tensor,
    table_index: Tensor,
    table_page: Tensor,
    width: int,
    page_size: int,
    given: Tensor | None = None,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """See `decode_inputs`; returns token_ids, kv_len, kv_slots, tables."""
    rows, device, groups = row_slot.shape[0], row_slot.device, page_tables.shape[0]
    token_ids = torch.empty(rows, dtype=torch.int32, device=device)
    kv_len = torch.empty(rows, dtype=torch.int32, device=device)
    # Each group's on a multiple of 16 bytes: kernels are compiled anew for pointers that are not so aligned.
    kv_slots = torch.empty((groups, triton.cdiv(rows, 4) * 4), dtype=torch.int32, device=device)
    tables = torch.empty((groups, triton.cdiv(rows * width, 4) * 4), dtype=torch.int32, device=device)
    _prepare[(rows, triton.cdiv(width, BLOCK), groups)](
        page_tables,
        last_token,
        row_slot,
        row_start,
        table_index,
        table_page,
        token_ids,
        kv_len,
        kv_slots,
        tables,
        token_ids if given is None else given,
        table_index.shape[0],
        page_tables.stride(0),
        page_tables.stride(1),
        width,
        tables.stride(0),
        kv_slots.stride(0),
        page_size,
        GIVEN=given is not None,
        BLOCK=BLOCK,
        **launch_options(),
    )
    by_group = tuple(table[: rows * width].view(rows, width) for table in tables)
    return token_ids, kv_len, tuple(cells[:rows] for cells in kv_slots), by_group

"""SlotTables: what an executor remembers of each seq slot between steps, and the CSR metadata made from it.

Fed by ForwardInput alone. Host side (numpy, no torch): the CPU executor computes from it directly, the CUDA
executor plans from it, the fake executor believes nothing else.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from engine.forward import SAMPLING_DTYPE, ForwardInput, Int32Array, Limits


class SlotTables:
    """page_tables int32 [groups, num_slots, max_pages_per_seq]; sampling SAMPLING_DTYPE [num_slots]; adapter int32
    [num_slots]: the index of its adapter, 0 for none."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        shape = len(limits.groups), limits.num_slots, limits.max_pages_per_seq
        self.page_tables: Int32Array = np.zeros(shape, np.int32)
        self.page_table: Int32Array = self.page_tables[0]  # of the first group, which often is the only one
        self._flat_table = self.page_tables.reshape(-1)
        self.sampling: npt.NDArray[Any] = np.zeros(limits.num_slots, SAMPLING_DTYPE)
        self.adapter: Int32Array = np.zeros(limits.num_slots, np.int32)

    def apply(self, forward_input: ForwardInput) -> None:
        """Take over the step's diffs. Must come before anything of the step reads a table."""
        staging = forward_input.staging
        count = forward_input.num_table_diffs
        if count:
            self._flat_table[staging.table_index[:count]] = staging.table_page[:count]
        count = forward_input.num_sampling_diffs
        if count:
            slots = staging.sampling_slot[:count]
            self.sampling[slots] = staging.sampling[:count]
            self.adapter[slots] = staging.adapter[:count]


class PagedMetadata:
    """FlashInfer's CSR description of one step for one memory group, int32 on the host.

    qo_indptr [rows + 1], kv_indptr [rows + 1], kv_indices [kv_indptr[-1]], last_page_len [rows] (1..page_size),
    kv_len [rows], positions [tokens], kv_slots int64 [tokens] (page * page_size + offset: where a token's K and V go).
    Buffers are kept between steps; the arrays are views that the next `build` overwrites.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        rows, tokens = limits.max_num_seqs, limits.max_num_batched_tokens
        self._kv_indptr = np.zeros(rows + 1, np.int32)
        self._columns = np.arange(limits.max_pages_per_seq, dtype=np.int32)
        self._token_columns = np.arange(tokens, dtype=np.int32)
        self.num_rows = 0
        self.qo_indptr: Int32Array = np.zeros(1, np.int32)
        self.kv_indptr: Int32Array = self._kv_indptr[:1]
        self.kv_indices: Int32Array = np.zeros(0, np.int32)
        self.last_page_len: Int32Array = np.zeros(0, np.int32)
        self.kv_len: Int32Array = np.zeros(0, np.int32)
        self.positions: Int32Array = np.zeros(0, np.int32)
        self.kv_slots: npt.NDArray[np.int64] = np.zeros(0, np.int64)

    def build(self, forward_input: ForwardInput, tables: SlotTables, group: int = 0) -> None:
        """Describe a step whose diffs `tables` has already applied."""
        page_size = self.limits.page_size
        staging, rows, tokens = forward_input.staging, forward_input.num_rows, forward_input.num_tokens
        slots = staging.row_slot[:rows]
        start, length = staging.row_start[:rows], staging.row_len[:rows]
        self.num_rows = rows
        self.qo_indptr = staging.qo_indptr[: rows + 1]
        self.kv_len = start + length
        num_pages = -(-self.kv_len // page_size)
        np.cumsum(num_pages, out=self._kv_indptr[1 : rows + 1])
        self.kv_indptr = self._kv_indptr[: rows + 1]
        self.last_page_len = self.kv_len - (num_pages - 1) * page_size
        if forward_input.num_decode_rows == rows:
            positions, token_slots = start, slots
        else:
            row_of_token = np.repeat(np.arange(rows, dtype=np.int32), length)
            positions = (start - self.qo_indptr[:-1])[row_of_token] + self._token_columns[:tokens]
            token_slots = slots[row_of_token]
        self.positions = positions
        self._read(tables.page_tables[group], slots, num_pages, token_slots)

    def build_like(self, other: PagedMetadata, forward_input: ForwardInput, tables: SlotTables, group: int) -> None:
        """The same step for another group: only page ids differ."""
        rows = self.num_rows = other.num_rows
        self.qo_indptr, self.kv_indptr, self.kv_len = other.qo_indptr, other.kv_indptr, other.kv_len
        self.last_page_len, self.positions = other.last_page_len, other.positions
        slots = token_slots = forward_input.staging.row_slot[:rows]
        if forward_input.num_decode_rows != rows:
            token_slots = np.repeat(slots, forward_input.staging.row_len[:rows])
        self._read(tables.page_tables[group], slots, np.diff(self.kv_indptr), token_slots)

    def _read(self, table: Int32Array, slots: Int32Array, num_pages: Int32Array, token_slots: Int32Array) -> None:
        page_size, positions = self.limits.page_size, self.positions
        width = int(num_pages.max(initial=0))
        self.kv_indices = table[slots, :width][self._columns[:width] < num_pages[:, None]]
        pages = table[token_slots, positions // page_size]
        self.kv_slots = pages.astype(np.int64) * page_size + positions % page_size


class StepMetadata:
    """The metadata of every memory group; `of_groups` is valid until the next `build`."""

    def __init__(self, limits: Limits) -> None:
        self.of_groups = [PagedMetadata(limits) for _ in limits.groups]

    def build(self, forward_input: ForwardInput, tables: SlotTables) -> PagedMetadata:
        """Describe a step whose diffs `tables` has already applied; returns the first group's."""
        first = self.of_groups[0]
        first.build(forward_input, tables)
        for group, metadata in enumerate(self.of_groups[1:], 1):
            metadata.build_like(first, forward_input, tables, group)
        return first

"""Paged attention on the CPU: one native call a layer, or a loop of SDPA over the rows where that is missing.

Owns the KV memory. Used by the executor's thread alone.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from engine.groups import MemoryGroup, num_buffers, places_of
from engine.ops import native
from engine.ops.attention.base import AttentionSpec
from engine.ops.attention.sequence import attend_sequence
from engine.ops.rope import apply_rope

if TYPE_CHECKING:
    from engine.executor.tables import PagedMetadata

# The kernel keeps the scales of one task's rows on its stack.
MAX_GROUP = 128


class _Step(ctypes.Structure):
    """AttentionStep of kernels.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("qo_indptr", "kv_indptr", "kv_indices", "last_page_len", "positions")),
        ("kv_slots", ctypes.c_void_p),
        *(
            (name, ctypes.c_int64)
            for name in ("rows", "tokens", "heads", "kv_heads", "head_dim", "page_size", "type", "threads")
        ),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    ]


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeroed memory that the system hands out at first touch (torch.zeros would write all of it at once)."""
    raw = np.zeros(int(np.prod(shape)) * dtype.itemsize, np.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape)


def _arrays_of(metadata: PagedMetadata) -> tuple[np.ndarray, ...]:
    """As _Step names them."""
    int32 = np.int32
    return (
        np.ascontiguousarray(metadata.qo_indptr, int32),
        np.ascontiguousarray(metadata.kv_indptr, int32),
        np.ascontiguousarray(metadata.kv_indices, int32),
        np.ascontiguousarray(metadata.last_page_len, int32),
        np.ascontiguousarray(metadata.positions, int32),
        np.ascontiguousarray(metadata.kv_slots, np.int64),
    )


class Backend:
    """AttentionBackend over pools in host memory: one of K and one of V for each buffer of a memory group, so layers of
    different groups may share pools, in which their pages are different ones."""

    def __init__(
        self,
        spec: AttentionSpec,
        *,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        groups: tuple[MemoryGroup, ...] = (MemoryGroup(),),
    ) -> None:
        assert spec.num_heads % spec.num_kv_heads == 0
        self.spec = spec
        self.page_size = page_size
        self._places = places_of(groups, spec.num_layers)
        self._num_buffers = num_buffers(groups, spec.num_layers)
        self._num_pages = num_pages
        self._dtype = dtype
        self.allocate()
        self._windows = spec.window or (None,) * spec.num_layers
        self._library: native.Library | None = None
        # By group.
        self._metadata: tuple[PagedMetadata, ...] = ()
        self._arrays: list[tuple[np.ndarray, ...]] = []
        self._steps: list[_Step] = []
        self._handle: ctypes.PyDLL | ctypes.CDLL | None = None

    def allocate(self) -> None:
        """See AttentionBackend."""
        spec = self.spec
        shape = (self._num_pages + 1, self.page_size, spec.num_kv_heads, spec.head_dim)
        self.k_pools = [lazy_zeros(shape, self._dtype) for _ in range(self._num_buffers)]
        self.v_pools = [lazy_zeros(shape, self._dtype) for _ in range(self._num_buffers)]

    def release(self) -> None:
        """See AttentionBackend."""
        self.k_pools, self.v_pools = [], []

    def plan(self, *groups: PagedMetadata) -> None:
        """See AttentionBackend. Nothing is copied: the arrays must live until the step is done."""
        spec, metadata = self.spec, groups[0]
        self._metadata = groups
        library, code = native.library(), native.type_code(self._dtype)
        if library is None or code is None or spec.num_heads // spec.num_kv_heads > MAX_GROUP:
            self._handle = None
            return
        self._arrays = [_arrays_of(group) for group in groups]
        self._steps = [
            _Step(
                *(array.ctypes.data for array in arrays),
                metadata.num_rows,
                len(metadata.positions),
                spec.num_heads,
                spec.num_kv_heads,
                spec.head_dim,
                self.page_size,
                code,
                torch.get_num_threads(),
                spec.scale,
                spec.softcap or 0.0,
            )
            for arrays in self._arrays
        ]
        lengths = metadata.qo_indptr[1 : metadata.num_rows + 1] - metadata.qo_indptr[: metadata.num_rows]
        pairs = int(np.dot(lengths.astype(np.int64), metadata.kv_len))
        self._handle = library.by_work(pairs * spec.num_heads * spec.head_dim // 4)

    def forward(self, layer: int, q: Tensor, k: Tensor, v: Tensor, cos_sin: Tensor | None = None) -> Tensor:
        """See AttentionBackend."""
        group, buffer = self._places[layer]
        k_pool, v_pool, window = self.k_pools[buffer], self.v_pools[buffer], self._windows[layer]
        handle = self._handle
        if handle is None:
            return self._torch_forward(self._metadata[group], q, k, v, k_pool, v_pool, window, cos_sin)
        step = self._steps[group]
        tokens, heads, dim = q.shape
        assert tokens == step.tokens and q.dtype == self._dtype
        q, k, v = (x if x.stride(2) == 1 and x.stride(1) == dim else x.contiguous() for x in (q, k, v))
        out = torch.empty((tokens, heads * dim), dtype=q.dtype)
        handle.ol_attention(
            ctypes.addressof(step),
            q.data_ptr(),
            q.stride(0),
            k.data_ptr(),
            k.stride(0),
            v.data_ptr(),
            v.stride(0),
            k_pool.data_ptr(),
            v_pool.data_ptr(),
            out.data_ptr(),
            window or 0,
            None if cos_sin is None else cos_sin.data_ptr(),
            0 if cos_sin is None else cos_sin.shape[1],
        )
        return out

    def _torch_forward(
        self,
        metadata: PagedMetadata,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_pool: Tensor,
        v_pool: Tensor,
        window: int | None,
        cos_sin: Tensor | None,
    ) -> Tensor:
        spec = self.spec
        if cos_sin is not None:
            apply_rope(q, k, cos_sin, torch.from_numpy(np.ascontiguousarray(metadata.positions)))
        slots = torch.from_numpy(metadata.kv_slots)
        k_pool.view(-1, spec.num_kv_heads, spec.head_dim)[slots] = k
        v_pool.view(-1, spec.num_kv_heads, spec.head_dim)[slots] = v
        out = torch.empty((q.shape[0], spec.num_heads * spec.head_dim), dtype=q.dtype)
        for row in range(metadata.num_rows):
            first, last = int(metadata.qo_indptr[row]), int(metadata.qo_indptr[row + 1])
            pages = metadata.kv_indices[metadata.kv_indptr[row] : metadata.kv_indptr[row + 1]]
            index, length = torch.from_numpy(pages.astype(np.int64)), int(metadata.kv_len[row])
            keys = k_pool[index].flatten(0, 1)[:length]
            values = v_pool[index].flatten(0, 1)[:length]
            out[first:last] = attend_sequence(spec, window, q[first:last], keys, values).flatten(1)
        return out

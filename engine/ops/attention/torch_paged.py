"""Paged attention on the CPU: one native call a layer, or a loop of SDPA over the rows where that is missing.

Owns the KV memory. Used by the executor's thread alone.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from engine.groups import Chunk, MemoryGroup, places_of
from engine.ops import native
from engine.ops.attention import coded
from engine.ops.attention.base import AttentionSpec, LayerAttention
from engine.ops.attention.sequence import attend_sequence
from engine.ops.recording import Recordings
from engine.ops.rope import apply_rope

if TYPE_CHECKING:
    from engine.executor.tables import PagedMetadata
    from engine.ops.state import States

# The kernel keeps the scales of one task's rows on its stack.
MAX_GROUP = 128
# How the kernels call what the pools hold, where it is not the model's dtype.
_POOLS = {torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
# Beyond the last token of a pool: the kernel loads the end of a head as whole vectors.
OVER_BYTES = 64


class _Step(ctypes.Structure):
    """AttentionStep of kernels.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("qo_indptr", "kv_indptr", "kv_indices", "last_page_len", "positions")),
        ("kv_slots", ctypes.c_void_p),
        *(
            (name, ctypes.c_int64)
            for name in (
                *("rows", "tokens", "heads", "kv_heads", "head_dim", "value_dim", "k_stride", "v_stride"),
                *("page_size", "both_ways", "type", "threads", "pools", "split"),
            )
        ),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    ]


# Zeroed memory of a shape, and of OVER_BYTES more.
Zeros = Callable[[tuple[int, ...], torch.dtype], Tensor]


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeroed memory that the system hands out at first touch (torch.zeros would write all of it at once)."""
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.zeros(size + OVER_BYTES, np.uint8)
    return torch.from_numpy(raw)[:size].view(dtype).view(shape)


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


@dataclass(frozen=True, slots=True)
class _Kind:
    """What layers must share to be called with one _Step. strides: numbers between two tokens of a K and V buffer."""

    group: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    softcap: float
    strides: tuple[int, int]
    bidirectional: bool
    split: int


@dataclass(slots=True)
class _Place:
    """Where a layer's K and V are: pools [num_pages + 1, page_size, Hkv, D], views of its buffers; of codes with the
    scales [num_pages + 1, page_size, Hkv, parts] of these."""

    layer: LayerAttention
    kind: int
    buffer: int
    k_pool: Tensor
    v_pool: Tensor
    k_scales: Tensor | None = None
    v_scales: Tensor | None = None


class Backend:
    """AttentionBackend over pools in host memory: one of K and one of V for each buffer of a memory group, so layers of
    different groups may share pools, in which their pages are different ones. A buffer is as wide as the widest layer
    that has its place there; others use the front of a token's part.

    dtype: of the model. kv_dtype: of the pools, that one, bfloat16 or float16, or int8 (see ops/attention/coded.py);
    arithmetic is as it is without. zeros: makes the pools, K's and then V's."""

    def __init__(
        self,
        spec: AttentionSpec,
        *,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        kv_dtype: torch.dtype | None = None,
        groups: tuple[MemoryGroup, ...] = (MemoryGroup(),),
        zeros: Zeros = lazy_zeros,
    ) -> None:
        assert kv_dtype in (None, dtype, *_POOLS)
        self.spec = spec
        self.states: States | None = None
        self.recordings: Recordings | None = Recordings()
        self.page_size = page_size
        self._kv_dtype = kv_dtype or dtype
        self._zeros = zeros
        self._widths, self._places_of_owners = self._lay_out(groups)
        self._num_pages = num_pages
        self._dtype = dtype
        self._kinds: list[_Kind] = []
        # By layer; None for one without K and V.
        self._places: list[_Place | None] = []
        self.allocate()
        self._largest_group = max((kind.num_heads // kind.num_kv_heads for kind in self._kinds), default=0)
        self._most_work = max((kind.num_heads * kind.head_dim for kind in self._kinds), default=0)
        # By group.
        self._metadata: tuple[PagedMetadata, ...] = ()
        self._arrays: list[tuple[np.ndarray, ...]] = []
        # By kind.
        self._steps: list[_Step] = []
        self._library: native.Library | None = None
        self._work = 0

    def _lay_out(self, groups: tuple[MemoryGroup, ...]) -> tuple[list[tuple[int, int]], dict[int, tuple[int, int]]]:
        """Numbers of K and V of a token in every buffer, and the group and the buffer of every layer that has K and V
        of its own."""
        owners = self.spec.owners
        places = dict(zip(owners, places_of(groups, len(owners)), strict=True))
        return self.spec.buffer_widths(groups, self._kv_dtype), places

    def allocate(self) -> None:
        """See AttentionBackend."""
        if self.recordings is not None:
            self.recordings.clear()
        cells = self._num_pages + 1, self.page_size
        self.k_pools = [self._zeros((*cells, keys), self._kv_dtype) for keys, _ in self._widths]
        self.v_pools = [self._zeros((*cells, values), self._kv_dtype) for _, values in self._widths]
        self._places = [self._place(number) for number in range(len(self.spec.layers))]

    def release(self) -> None:
        """See AttentionBackend."""
        if self.recordings is not None:
            self.recordings.clear()
        self.k_pools, self.v_pools = [], []
        self._places = []

    def _place(self, number: int) -> _Place | None:
        layer = self.spec.layers[number]
        if layer is None:
            return None
        group, buffer = self._places_of_owners[layer.own(number)]
        k_buffer, v_buffer = self.k_pools[buffer], self.v_pools[buffer]
        if layer.values_in_keys:
            v_buffer = k_buffer
        k_pool, v_pool = (
            pool[:, :, : layer.num_kv_heads * dim].unflatten(2, (layer.num_kv_heads, dim))
            for pool, dim in ((k_buffer, layer.head_dim), (v_buffer, layer.value_dim))
        )
        shape = layer.num_heads, layer.num_kv_heads, layer.head_dim, layer.value_dim
        strides = k_buffer.shape[2], v_buffer.shape[2]
        split = coded.split_of(layer)
        kind = _Kind(group, *shape, layer.scale, layer.softcap or 0.0, strides, layer.bidirectional, split)
        if kind not in self._kinds:
            self._kinds.append(kind)
        place = _Place(layer, self._kinds.index(kind), buffer, k_pool, v_pool)
        if self._kv_dtype == torch.int8:
            parts = 2 if split < layer.head_dim else 1
            place.k_scales = coded.scales_of(k_buffer, layer.num_kv_heads, layer.head_dim, parts)
            if not layer.values_in_keys:
                place.v_scales = coded.scales_of(v_buffer, layer.num_kv_heads, layer.value_dim)
        return place

    def plan(self, *groups: PagedMetadata) -> None:
        """See AttentionBackend. Nothing is copied: the arrays must live until the step is done."""
        metadata = groups[0]
        self._metadata = groups
        library, code = native.library(), native.type_code(self._dtype)
        if library is None or code is None or self._largest_group > MAX_GROUP:
            self._library = None
            return
        self._arrays = [_arrays_of(group) for group in groups]
        # Recorded calls have their addresses.
        self._steps += [_Step() for _ in self._kinds[len(self._steps) :]]
        for step, kind in zip(self._steps, self._kinds, strict=True):
            step.__init__(  # type: ignore[misc]
                *(array.ctypes.data for array in self._arrays[kind.group]),
                metadata.num_rows,
                len(metadata.positions),
                kind.num_heads,
                kind.num_kv_heads,
                kind.head_dim,
                kind.value_dim,
                *kind.strides,
                self.page_size,
                kind.bidirectional,
                code,
                torch.get_num_threads(),
                0 if self._kv_dtype == self._dtype else _POOLS[self._kv_dtype],
                kind.split,
                kind.scale,
                kind.softcap,
            )
        lengths = metadata.qo_indptr[1 : metadata.num_rows + 1] - metadata.qo_indptr[: metadata.num_rows]
        pairs = int(np.dot(lengths.astype(np.int64), metadata.kv_len))
        self._library, self._work = library, pairs * self._most_work // 4
        if self.recordings is not None:
            self.recordings.releases = self._work >= native.HOLD_GIL_BELOW

    def forward(
        self,
        layer: int,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        cos_sin: Tensor | None = None,
        *,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """See AttentionBackend."""
        place = self._places[layer]
        assert place is not None and (sinks is not None) == place.layer.sinks
        library = self._library
        if library is None:
            return self._torch_forward(place, q, k, v, cos_sin, sinks)
        step = self._steps[place.kind]
        tokens, heads, _ = q.shape
        assert tokens == step.tokens and q.dtype == self._dtype
        q = _dense_heads(q)
        if k is not None:
            k = _dense_heads(k)
        if v is not None:
            v = _dense_heads(v)
        out = torch.empty((tokens, heads * place.layer.value_dim), dtype=q.dtype)
        library.by_work(self._work).ol_attention(
            ctypes.addressof(step),
            q.data_ptr(),
            q.stride(0),
            None if k is None else k.data_ptr(),
            0 if k is None else k.stride(0),
            None if v is None else v.data_ptr(),
            0 if v is None else v.stride(0),
            place.k_pool.data_ptr(),
            place.v_pool.data_ptr(),
            out.data_ptr(),
            place.layer.window or 0,
            isinstance(place.layer.window, Chunk),
            None if sinks is None else sinks.data_ptr(),
            None if cos_sin is None else cos_sin.data_ptr(),
            0 if cos_sin is None else cos_sin.shape[1],
        )
        return out

    def _torch_forward(
        self,
        place: _Place,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        cos_sin: Tensor | None,
        sinks: Tensor | None,
    ) -> Tensor:
        metadata, layer = self._metadata[self._kinds[place.kind].group], place.layer
        k_pool, v_pool = place.k_pool, place.v_pool
        if cos_sin is not None:
            apply_rope(q, k, cos_sin, torch.from_numpy(np.ascontiguousarray(metadata.positions)))
        slots = torch.from_numpy(metadata.kv_slots)
        split = coded.split_of(layer)
        for pool, scales, new, end in (
            (k_pool, place.k_scales, k, split),
            (v_pool, place.v_scales, v, layer.value_dim),
        ):
            if new is None:
                continue
            if scales is not None:
                new, scales.flatten(0, 1)[slots] = coded.to_codes(new, end)
            pool.flatten(0, 1)[slots] = new.to(pool.dtype)
        out = torch.empty((q.shape[0], layer.num_heads * layer.value_dim), dtype=q.dtype)
        for row in range(metadata.num_rows):
            first, last = int(metadata.qo_indptr[row]), int(metadata.qo_indptr[row + 1])
            pages = metadata.kv_indices[metadata.kv_indptr[row] : metadata.kv_indptr[row + 1]]
            index, length = torch.from_numpy(pages.astype(np.int64)), int(metadata.kv_len[row])
            keys = k_pool[index].flatten(0, 1)[:length]
            values = v_pool[index].flatten(0, 1)[:length]
            if place.k_scales is not None:
                keys = coded.to_numbers(keys, place.k_scales[index].flatten(0, 1)[:length], split).to(q.dtype)
                if place.v_scales is None:
                    values = keys[..., : layer.value_dim]
                else:
                    scales = place.v_scales[index].flatten(0, 1)[:length]
                    values = coded.to_numbers(values, scales, layer.value_dim).to(q.dtype)
            keys, values = keys.to(q.dtype), values.to(q.dtype)
            out[first:last] = attend_sequence(layer, q[first:last], keys, values, sinks).flatten(1)
        return out


def _dense_heads(x: Tensor) -> Tensor:
    """[T, H, D] with each token's heads in one piece."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()

"""What exists of a step on the host and on the device: pinned staging and its image, metadata, results, and the handle.

Two `Side`s alternate by the step's parity; where rows speculate there are two wider ones beside them, for steps with
drafts (cuda_drafts.py). Made and written by the CUDA executor on the loop thread.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.executor.cuda_device import DeviceLayer
from engine.executor.speculator import Positions
from engine.executor.tables import StepMetadata
from engine.forward import ForwardInput, ForwardOutput, Int32Array, Limits, Staging
from engine.ops.sampling.layout import WORDS

# Every array of the staging arena starts on a multiple of this many bytes.
ALIGN = 64
# Rows of a step in which every draft is one, where its sequences are fewer: about where a step begins to be bound by
# arithmetic, so that a draft more would cost what it may bring.
MOST_DRAFTED_ROWS = 256


def widened(limits: Limits) -> Limits:
    """Of a step in which every draft is a row of its own."""
    most = min(limits.max_num_seqs * (1 + limits.max_draft_tokens), MOST_DRAFTED_ROWS, limits.max_num_batched_tokens)
    return dataclasses.replace(limits, max_num_seqs=max(limits.max_num_seqs, most), max_draft_tokens=0)


@dataclass(slots=True, eq=False)
class Drafted:
    """A step with speculating rows on its way.

    step: as it runs, a row for each sequence. positions: what it samples; sampled int64 [positions]: the rows that they
    are on the device, where every draft is a row of its own. rows int64: of each row there, the step's. shift: how many
    more there are.
    """

    step: ForwardInput
    positions: Positions
    sampled: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    shift: int


@dataclass(slots=True, eq=False)
class CudaHandle:
    """A launched step. keep: tensors that must outlive the device's work on it. num_rows: on the device.

    given: the step, where rows may speculate; drafted: what became of it, where some do; positions: what is sampled
    then, by rows of the step as it was given, which masks are for.
    reading: what a draft model does before it; told: by row on the device, the drafts that it made, once they are here.
    early: those drafts on the host, of each spot of the reading, as soon as side.told is done.
    draw: set while its sampling waits for masks. downloads: (to, from) beside the tokens; readers: what puts them into
    the output.
    """

    step: int
    num_rows: int
    side: Side
    began_at: float = 0.0
    ended_at: float = 0.0
    error: Exception | None = None
    waited: bool = False
    given: ForwardInput | None = None
    drafted: Drafted | None = None
    positions: Positions | None = None
    reading: Any = None
    told: dict[int, int] = field(default_factory=dict)
    early: Int32Array | None = None
    draw: Callable[[], None] | None = None
    keep: list[Tensor] = field(default_factory=list)
    downloads: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    readers: list[Callable[[ForwardOutput], object]] = field(default_factory=list)


class PinnedArena:
    """One block of pinned memory that the arrays of a Staging are cut from, so that one copy uploads them all."""

    def __init__(self, layer: DeviceLayer, num_bytes: int) -> None:
        self._layer = layer
        self.memory = layer.pinned(num_bytes)
        self._bytes: npt.NDArray[np.uint8] = self.memory.numpy()
        self._used = 0

    def allocate(self, length: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """An `Allocator`. What no longer fits (a grown table diff) becomes pinned memory of its own."""
        size = length * dtype.itemsize
        start, end = self._used, self._used + size
        if end > len(self._bytes):
            return self._layer.pinned(size).numpy().view(dtype)
        self._used = -(-end // ALIGN) * ALIGN
        return self._bytes[start:end].view(dtype)

    def offset_of(self, array: npt.NDArray[Any]) -> int:
        """In bytes from the start of the arena."""
        offset = int(array.ctypes.data - self._bytes.ctypes.data)
        assert 0 <= offset < len(self._bytes)
        return offset

    @staticmethod
    def size_for(limits: Limits) -> int:
        sizes: list[int] = []

        def count(length: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
            sizes.append(-(-length * dtype.itemsize // ALIGN) * ALIGN)
            return np.zeros(length, dtype)

        Staging(limits, count)
        return sum(sizes)


class Side:
    """One of the sets of step buffers: host staging, its image on the device, metadata, results, events.

    number: 0 and 1 of plain steps, 2 and 3 of those with drafts, by the step's parity.
    """

    def __init__(self, layer: DeviceLayer, limits: Limits, number: int) -> None:
        self.number, self.parity = number, number & 1
        self._layer = layer
        rows = limits.max_num_seqs
        self.arena = PinnedArena(layer, PinnedArena.size_for(limits))
        self.staging = Staging(limits, self.arena.allocate)
        self.block = layer.zeros((self.arena.memory.numel(),), torch.uint8)
        self.row_slot = self._image(self.staging.row_slot)
        self.row_start = self._image(self.staging.row_start)
        self.token_ids = self._image(self.staging.token_ids)
        self.table_index = self._image(self.staging.table_index)
        self.table_page = self._image(self.staging.table_page)
        self.sampling_slot = self._image(self.staging.sampling_slot)
        self.sampling = self._image(self.staging.sampling).view(rows, WORDS)
        # Staging may replace these two by larger ones; graphs go on reading the first.
        self.first_index, self.first_page = self.staging.table_index, self.staging.table_page
        self.metadata = StepMetadata(limits)
        per_token = 2 + len(limits.groups)
        self.meta_host = layer.pinned(
            4 * (per_token * limits.max_num_batched_tokens + 16 * (rows + 4) + limits.num_pages)
        )
        self.meta_host = self.meta_host.view(torch.int32)
        self.meta = layer.zeros((self.meta_host.numel(),), torch.int32)
        self.out = layer.zeros((rows,), torch.int32)
        self.result_host = layer.pinned(4 * rows).view(torch.int32)
        self.result: Int32Array = self.result_host.numpy()
        self.uploaded, self.computed, self.done = layer.event(), layer.event(), layer.event()
        # Of drafts that the host must know before the step has ended.
        self.drafted, self.told = layer.event(), layer.event()

    @property
    def has_drafts(self) -> bool:
        """Of its rows that continue a sequence some bring a token, which follows that of the row before: a draft."""
        return self.number > 1

    def _image(self, array: npt.NDArray[Any]) -> Tensor:
        """The place of a staging array in the block, as int32."""
        offset = self.arena.offset_of(array)
        return self.block[offset : offset + array.nbytes].view(torch.int32)

    def end_of(self, array: npt.NDArray[Any], count: int) -> int:
        """Bytes of the arena up to `count` entries of an array."""
        return self.arena.offset_of(array) + count * array.dtype.itemsize

    def write_meta(self, parts: Sequence[npt.NDArray[Any]], upload: Any) -> tuple[list[slice], int]:
        """Lay arrays into the metadata, each on a multiple of 16 bytes: where they are, and the length in words.

        Kernels are compiled anew for pointers that are not so aligned.
        """
        sizes = [-(-len(part) // 4) * 4 for part in parts]
        starts = [0, *np.cumsum(sizes).tolist()]
        with self._layer.on(upload):
            self.reserve_meta(starts[-1])
        host = self.meta_host.numpy()
        cuts = [slice(start, start + len(part)) for start, part in zip(starts, parts, strict=False)]
        for cut, part in zip(cuts, parts, strict=True):
            host[cut] = part
        return cuts, starts[-1]

    def reserve_meta(self, length: int) -> None:
        if length > self.meta_host.numel():
            capacity = max(length, 2 * self.meta_host.numel())
            self.meta_host = self._layer.pinned(4 * capacity).view(torch.int32)
            self.meta = self._layer.zeros((capacity,), torch.int32)

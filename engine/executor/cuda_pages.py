"""DevicePages: KV memory on a GPU as bytes, to and from page-locked host memory (see DeviceMemory).

Copies have a stream and threads of their own, one at a time, and run beside the steps. A batch goes through a piece of
device memory in which pages lie whole, so that each is one copy over the bus. That no step writes what is copied is up
to whoever asks: pages that are lent, when the steps that named them are through; the thread returns when the event
behind its copies is done, and only then is anybody told.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.config import StartupError
from engine.executor.cuda_device import DeviceLayer
from engine.forward import Int32Array

Rows = npt.NDArray[np.uint8]

# What a copy fails by where the device's memory is short, and nothing else is wrong with it.
OutOfMemoryError = torch.OutOfMemoryError
# Of pages' bytes; what is in here may have been written by an older version.
LAYOUT_VERSION = 1
# Pages are gathered and scattered in so many bytes at once, at most.
BATCH_BYTES = 2**25
MOST_AT_ONCE = 64


class PageCopier:
    """What the copies of one device share: a stream, and its event. lock: held by the thread whose copies they are."""

    def __init__(self, layer: DeviceLayer) -> None:
        self.layer = layer
        self.lock = threading.Lock()
        with layer.may_block():
            self.stream = layer.stream()
            self.event = layer.event()


class DevicePages:
    """A DeviceMemory. parts: uint8 [pages, bytes of a page] each, on the device; page 0 is nobody's."""

    def __init__(self, copier: PageCopier, parts: Sequence[Tensor], layout: str) -> None:
        assert parts and all(part.is_contiguous() and part.dtype == torch.uint8 for part in parts)
        self._copier = copier
        layer = copier.layer
        sizes = [part.shape[1] for part in parts]
        self.page_bytes = sum(sizes)
        self.layout = f"{layout} parts {' '.join(map(str, sizes))}"
        self.rows_at_once = max(1, min(MOST_AT_ONCE, BATCH_BYTES // self.page_bytes))
        # Bytes are moved by words.
        word = torch.int64 if all(size % 8 == 0 for size in sizes) else torch.uint8
        self._parts = [part.view(word) for part in parts]
        with layer.may_block():
            self._batch = layer.zeros((self.rows_at_once, self.page_bytes), torch.uint8)
            self._places = layer.zeros((self.rows_at_once,), torch.int32)
            self._host_places = layer.pinned(4 * self.rows_at_once).view(torch.int32)
            host = layer.pinned(self.rows_at_once * self.page_bytes).numpy()
            self._host_rows: Rows = host.reshape(self.rows_at_once, self.page_bytes)
            layer.synchronize_all()
        starts = np.cumsum([0, *(part.shape[1] for part in self._parts)]).tolist()
        whole = self._batch.view(word)
        self._pieces = [whole[:, start:end] for start, end in itertools.pairwise(starts)]

    def release(self) -> None:
        """The memory is given back: nothing here holds it, and nothing can be copied any more."""
        self._parts, self._pieces = [], []

    def rows(self, count: int) -> Rows:
        """See DeviceMemory."""
        try:
            return self._copier.layer.pinned(count * self.page_bytes).numpy().reshape(count, self.page_bytes)
        except RuntimeError as error:
            size = count * self.page_bytes / 1e9
            raise StartupError(f"no {size:.2g} GB of page-locked memory: {str(error).splitlines()[0]}") from error

    def copy_rows_out(self, pages: Int32Array, rows: Sequence[Rows]) -> None:
        """See DeviceMemory."""
        for first in range(0, len(pages), self.rows_at_once):
            with self._copier.lock:
                self._copy_out(pages[first : first + self.rows_at_once], rows[first : first + self.rows_at_once])

    def _copy_out(self, pages: Int32Array, rows: Sequence[Rows]) -> None:
        layer, count = self._copier.layer, len(pages)
        places = self._places[:count]

        def gather() -> None:
            for part, piece in zip(self._parts, self._pieces, strict=True):
                piece[:count].copy_(part.index_select(0, places))

        with layer.on(self._copier.stream):
            self._send_places(pages)
            layer.launch(gather)
            for number, row in enumerate(rows):
                layer.download(torch.from_numpy(row), self._batch[number])
            layer.record(self._copier.event)
        layer.synchronize(self._copier.event)

    def copy_rows_in(self, pages: Int32Array, rows: Sequence[Rows]) -> None:
        """See DeviceMemory."""
        for first in range(0, len(pages), self.rows_at_once):
            with self._copier.lock:
                self._copy_in(pages[first : first + self.rows_at_once], rows[first : first + self.rows_at_once])

    def _copy_in(self, pages: Int32Array, rows: Sequence[Rows]) -> None:
        layer, count = self._copier.layer, len(pages)
        places = self._places[:count]

        def scatter() -> None:
            for part, piece in zip(self._parts, self._pieces, strict=True):
                part.index_copy_(0, places.long(), piece[:count])

        with layer.on(self._copier.stream):
            self._send_places(pages)
            for number, row in enumerate(rows):
                layer.upload(self._batch[number], torch.from_numpy(row))
            layer.launch(scatter)
            layer.record(self._copier.event)
        layer.synchronize(self._copier.event)

    def _send_places(self, pages: Int32Array) -> None:
        count = len(pages)
        self._host_places.numpy()[:count] = pages
        self._copier.layer.upload(self._places[:count], self._host_places[:count])

    def copy_out(self, pages: Int32Array, into: Rows) -> None:
        """See PageMemory; into memory of any kind, by way of page-locked memory."""
        for first in range(0, len(pages), self.rows_at_once):
            some = pages[first : first + self.rows_at_once]
            with self._copier.lock:
                rows = self._host_rows[: len(some)]
                self._copy_out(some, list(rows))
                into[first : first + len(some)] = rows

    def copy_in(self, pages: Int32Array, data: Rows) -> None:
        """See PageMemory; from memory of any kind, by way of page-locked memory."""
        for first in range(0, len(pages), self.rows_at_once):
            some = pages[first : first + self.rows_at_once]
            with self._copier.lock:
                rows = self._host_rows[: len(some)]
                rows[:] = data[first : first + len(some)]
                self._copy_in(some, list(rows))

    def regions(self) -> list[tuple[int, int, int]]:
        """See PageMemory."""
        raise StartupError("its peers read host memory, and these pages are on a GPU; the TcpConnector carries them")

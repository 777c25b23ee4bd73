"""HostPages: KV memory that lies in host memory, as bytes (see PageMemory)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from engine.forward import Int32Array

Rows = npt.NDArray[np.uint8]


class HostPages:
    """A PageMemory. parts: uint8 [pages, bytes of a page] each, views of the memory; pages as the KV cache counts them,
    page 0 is nobody's."""

    def __init__(self, parts: Sequence[Rows], layout: str) -> None:
        assert parts and all(part.flags.c_contiguous for part in parts)
        self._parts = [part for part in parts if part.shape[1]]
        self.page_bytes = sum([part.shape[1] for part in self._parts])
        self.layout = f"{layout} parts {' '.join([str(part.shape[1]) for part in self._parts])}"

    def copy_out(self, pages: Int32Array, into: Rows) -> None:
        """See PageMemory."""
        start = 0
        for part in self._parts:
            end = start + part.shape[1]
            into[:, start:end] = part[pages]
            start = end

    def copy_in(self, pages: Int32Array, data: Rows) -> None:
        """See PageMemory."""
        start = 0
        for part in self._parts:
            end = start + part.shape[1]
            part[pages] = data[:, start:end]
            start = end

    def regions(self) -> list[tuple[int, int, int]]:
        """See PageMemory."""
        return [(part.ctypes.data, part.shape[1], part.shape[0]) for part in self._parts]

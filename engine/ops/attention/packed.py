"""Attention in both directions over whole texts, one behind the other without padding; keeps nothing between steps.

A text is one row of a step, from its first token to its last. All layers use one buffer of K and one of V in turn, as
long as the longest step so far: the paged backend's own code over pages of one token. Used by the executor's thread.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.executor.tables import PagedMetadata
from engine.groups import MemoryGroup
from engine.ops.attention import torch_paged
from engine.ops.attention.base import AttentionSpec
from engine.ops.encoder import EncoderLayer

# Tokens by which the buffers grow.
STEP = 1024


class Backend(torch_paged.Backend):
    """AttentionBackend. What it is told of pages is not looked at."""

    def __init__(self, spec: AttentionSpec, *, dtype: torch.dtype, **_: Any) -> None:
        super().__init__(spec, num_pages=STEP, page_size=1, dtype=dtype)
        self.recordings = None  # texts are seldom as long as one before

    def _lay_out(self, groups: tuple[MemoryGroup, ...]) -> tuple[list[tuple[int, int]], dict[int, tuple[int, int]]]:
        layers = self.spec.attending
        assert all(layer.bidirectional and layer.reads is None for layer in layers.values())
        widths = [layer.widths for layer in layers.values()]
        return [(max(keys for keys, _ in widths), max(values for _, values in widths))], dict.fromkeys(layers, (0, 0))

    def plan(self, *groups: PagedMetadata) -> None:
        """See AttentionBackend."""
        given = groups[0]
        tokens = len(given.positions)
        assert (given.kv_len == np.diff(given.qo_indptr)).all(), "a text must be whole"
        if tokens > self._num_pages:
            self._num_pages = -(-tokens // STEP) * STEP
            self.allocate()
        super().plan(_Packed(given))

    @property
    def takes_layers(self) -> bool:
        """Whole layers can run over the planned step."""
        return self._library is not None

    def through(self, layer: EncoderLayer, x: Tensor) -> Tensor:
        """[T, width], written over by what the layer makes of the planned texts."""
        return layer(x, self._arrays[0][0][: self._metadata[0].num_rows + 1])


class _Packed(PagedMetadata):
    """Each token's keys and values lie where the token does in the step."""

    def __init__(self, given: PagedMetadata) -> None:
        tokens = len(given.positions)
        self.num_rows, self.positions = given.num_rows, given.positions
        self.qo_indptr = self.kv_indptr = given.qo_indptr
        self.kv_len, self.last_page_len = given.kv_len, np.ones(given.num_rows, np.int32)
        self.kv_indices = np.arange(tokens, dtype=np.int32)
        self.kv_slots = np.arange(tokens, dtype=np.int64)

"""Weights that stay in GGUF's blocks, or fit into some without loss, where a CPU has kernels for that.

Used at start, on the loading thread. A fused layer of several types becomes one for each run of rows of one type.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.config import StartupError
from engine.models.gguf.types import BY_NAME
from engine.models.loading.checkpoint import StoredTensor
from engine.models.loading.coded import CodedWeights
from engine.models.parts.source import PREFIX
from engine.ops.linear import Linear
from engine.ops.packed import PACKED_KINDS, MixedLinear, PackedLinear, can_stay_packed
from engine.ops.reordered import ReorderedLinear

# Bytes of the file that are packed before their pages are given back.
PIECE_BYTES = 1 << 20
# Of one fused layer whose rows are reordered: more would be slower than numbers.
MOST_RUNS = 8


class PackedWeights(CodedWeights):
    """CodedWeights with a PackedLinear for whatever has kernels for its blocks."""

    def linear(
        self,
        names: Sequence[str],
        rows: Sequence[int],
        columns: int,
        *,
        bias: bool = False,
        order: Tensor | None = None,
        activation: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Linear:
        """See Weights.linear. Quantised weights stay as they are, where there are kernels for them."""
        wanted = dtype or self.dtype
        weights = [f"{name}.weight" for name in names]
        self.round_layer(weights, dtype)
        stays = self._stay(weights, columns, wanted)
        same, columns_order = self.input_order(weights) if stays else (False, None)
        runs = self._runs(weights, rows, order) if same else None
        if runs is None:
            return super().linear(names, rows, columns, bias=bias, order=order, activation=activation, dtype=dtype)
        bias_vector = self.stacked([f"{name}.bias" for name in names], rows, dtype=dtype) if bias else None
        if order is not None and bias_vector is not None:
            bias_vector[: len(order)] = bias_vector[order]
        parts: list[Linear] = []
        done = 0
        for places in runs:
            end = done + len(places)
            own = bias_vector[done:end] if bias_vector is not None else None
            parts.append(self._part(weights, places, columns, wanted, own, activation if len(runs) == 1 else None))
            done = end
        self.linears.extend(parts)
        linear = parts[0] if len(parts) == 1 else MixedLinear(parts, activation)
        return linear if columns_order is None else ReorderedLinear(linear, columns_order)

    def output_layer(self, vocab: int, hidden: int, *, tied: bool, bias: bool = False) -> Linear:
        """See Weights.output_layer."""
        name = f"{PREFIX}embed_tokens.weight"
        if tied:
            self.round([name], as_output=True)
        embedding = self._embedding(name, vocab, hidden) if tied else None
        if embedding is None:
            return super().output_layer(vocab, hidden, tied=tied, bias=bias)
        self.linears.append(embedding)
        return embedding

    def embedding(self, name: str, count: int, width: int) -> Linear:
        """See Weights.embedding."""
        return self._embedding(name, count, width) or super().embedding(name, count, width)

    def _embedding(self, name: str, count: int, width: int) -> PackedLinear | None:
        if not self._stay([name], width, self.dtype) or self.input_order([name]) != (True, None):
            return None
        return self._packed([name], np.stack((np.zeros(count, np.int64), np.arange(count)), 1), width, self.dtype)

    def _is_packed(self, name: str) -> bool:
        return self.kept_kind(name) in PACKED_KINDS

    def _stay(self, names: Sequence[str], columns: int, dtype: torch.dtype) -> bool:
        """Whether a layer of these tensors is to be made of blocks at all; any of them may be of numbers."""
        return (
            can_stay_packed(dtype, self.device)
            and any(self._is_packed(name) for name in names)
            and all(self._tensors[name].undo is None for name in names)
            and all(columns % BY_NAME[self.kept_kind(name)].elements == 0 for name in names if self._is_packed(name))
        )

    def _runs(
        self, names: Sequence[str], rows: Sequence[int], order: Tensor | None
    ) -> list[np.ndarray[tuple[int, int], np.dtype[np.int64]]] | None:
        """int64 [n, 2] for each run of rows of one type: their tensors and rows there. None: not worth it."""
        tensors = np.repeat(np.arange(len(rows)), rows)
        places = np.stack((tensors, np.concatenate([np.arange(count) for count in rows])), 1)
        if order is not None:
            places[: len(order)] = places[order.numpy()]
        kinds = [self.kept_kind(name) for name in names]
        numbers = np.array([kinds.index(kind) for kind in kinds])[places[:, 0]]
        cuts = np.flatnonzero(np.diff(numbers)) + 1
        return np.split(places, cuts) if len(cuts) < MOST_RUNS else None

    def _part(
        self,
        names: Sequence[str],
        places: np.ndarray[tuple[int, int], np.dtype[np.int64]],
        columns: int,
        dtype: torch.dtype,
        bias: Tensor | None,
        activation: str | None,
    ) -> Linear:
        """A layer of rows of one type."""
        if self._is_packed(names[places[0, 0]]):
            return self._packed(names, places, columns, dtype, bias, activation)
        weight = torch.empty((len(places), columns), dtype=dtype)
        for tensor in np.unique(places[:, 0]):
            where = np.flatnonzero(places[:, 0] == tensor)
            whole = self.tensor(names[tensor], self._tensors[names[tensor]].shape, dtype)
            weight[torch.from_numpy(where)] = whole[torch.from_numpy(places[where, 1])]
        linear = Linear(weight, bias, activation)
        linear.prepare(deterministic=self.deterministic)
        return linear

    def _packed(
        self,
        names: Sequence[str],
        places: np.ndarray[tuple[int, int], np.dtype[np.int64]],
        columns: int,
        dtype: torch.dtype,
        bias: Tensor | None = None,
        activation: str | None = None,
    ) -> PackedLinear:
        """The blocks of rows of one type, brought from the mapped file into the order of the kernels."""
        stored = [self._tensors[name] for name in names]
        block = self.kept_kind(names[places[0, 0]])
        linear = PackedLinear(block, len(places), columns, dtype, bias, activation)
        if self.packed_input_bits == 8:
            linear.take_eight_bits()
        width = columns // BY_NAME[block].elements * BY_NAME[block].size
        step = PackedLinear.piece_rows(max(1, PIECE_BYTES // width))
        for first in range(0, len(places), step):
            piece = places[first : first + step]
            addresses = np.empty(len(piece), np.int64)
            held = []  # until they are packed
            for tensor in np.unique(piece[:, 0]):
                own = piece[:, 0] == tensor
                rows = piece[own, 1]
                base, apart = 0, stored[tensor].stride or width
                if stored[tensor].quantised is None:
                    base = self._address(stored[tensor])
                else:
                    begin, end = int(rows.min()), int(rows.max()) + 1
                    held.append(np.ascontiguousarray(self.kept_blocks(names[tensor], begin, end)))
                    base = held[-1].ctypes.data - begin * width
                addresses[own] = base + rows * apart
            bad = linear.pack(first, torch.from_numpy(addresses))
            if bad is not None:
                tensor, row = places[bad]
                raise StartupError(
                    f"{stored[tensor].file}: tensor {names[tensor]}: row {row} has a scale that is not a finite number"
                )
            for tensor in np.unique(piece[:, 0]):
                if stored[tensor].quantised is not None:
                    continue
                whole = piece[piece[:, 0] == tensor, 1]
                stride = stored[tensor].stride or width
                begin = stored[tensor].begin + int(whole.min()) * stride
                self._let_go(stored[tensor], begin, min(begin + len(whole) * stride, stored[tensor].end))
        return linear

    def _address(self, stored: StoredTensor) -> int:
        """Of a tensor in the mapped file."""
        mapped = self._files.get(stored.file, stored.end)
        address: int = np.frombuffer(mapped, np.uint8, 1, stored.begin).ctypes.data if math.prod(stored.shape) else 0
        return address

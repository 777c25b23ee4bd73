"""Weights of a quantised checkpoint that stay as they are stored, where a CPU has kernels for that.

Used at start, on the loading thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.config import StartupError
from engine.models.gguf.codes import FORMS, Form, Parts, split
from engine.models.gguf.types import BY_NAME
from engine.models.loading.schemes.base import Quantised
from engine.models.loading.weights import OUTPUT_WEIGHT, CheckpointWeights
from engine.models.parts.source import PREFIX
from engine.ops.coded import CODE_BLOCK, CodedLinear, Piece, can_keep_codes
from engine.ops.linear import Linear
from engine.ops.reordered import ReorderedLinear

_EMBEDDING = f"{PREFIX}embed_tokens.weight"
# Weights that are brought from one form into the other at once.
_PIECE = 4 * 1024 * 1024


class CodedWeights(CheckpointWeights):
    """CheckpointWeights with a CodedLinear for each layer whose parts are all stored in one form of integers."""

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
        """See Weights.linear. Quantised weights of one form stay as they are, where there are kernels for them."""
        weights = [f"{name}.weight" for name in names]
        if dtype is None and can_keep_codes(self.dtype, self.device):  # one that is asked for is a router's
            self.round(weights, as_output=weights == [OUTPUT_WEIGHT])
        form = self._common_form(weights, dtype or self.dtype)
        same, columns_order = self.input_order(weights) if form is not None else (False, None)
        if form is None or not same:
            return super().linear(names, rows, columns, bias=bias, order=order, activation=activation, dtype=dtype)
        bias_vector = self.stacked([f"{name}.bias" for name in names], rows, dtype=dtype) if bias else None
        if order is not None and bias_vector is not None:
            bias_vector[: len(order)] = bias_vector[order]
        pieces = self._pieces(weights, rows, columns, order)
        linear = CodedLinear(
            form.bits, form.low, sum(rows), columns, dtype or self.dtype, pieces, bias_vector, activation
        )
        self.linears.append(linear)
        return linear if columns_order is None else ReorderedLinear(linear, columns_order)

    def output_layer(self, vocab: int, hidden: int, *, tied: bool, bias: bool = False) -> Linear:
        """See Weights.output_layer."""
        if tied:
            self.round([_EMBEDDING], as_output=True)
        form = self._common_form([_EMBEDDING], self.dtype) if tied else None
        if form is None or self.input_order([_EMBEDDING]) != (True, None):
            return super().output_layer(vocab, hidden, tied=tied, bias=bias)
        pieces = self._pieces([_EMBEDDING], [vocab], hidden, None)
        linear = CodedLinear(form.bits, form.low, vocab, hidden, self.dtype, pieces)
        self.linears.append(linear)
        return linear

    def _common_form(self, names: Sequence[str], dtype: torch.dtype) -> Form | None:
        """What all of these are stored as, where a layer can be made of that; None where it cannot."""
        forms = {FORMS.get(self.kept_kind(name)) for name in names}
        plain = all(self._tensors[name].undo is None for name in names)
        if len(forms) != 1 or not plain or not can_keep_codes(dtype, self.device):
            return None
        return forms.pop()

    def _pieces(self, names: Sequence[str], rows: Sequence[int], columns: int, order: Tensor | None) -> Iterator[Piece]:
        """The tensors below one another, in pieces that are small where no order mixes their rows."""
        total = sum(rows)
        step = CodedLinear.piece_rows(_PIECE // columns) if order is None else total
        starts = [sum(rows[:index]) for index in range(len(rows))]
        for begin in range(0, total, step):
            end = min(begin + step, total)
            parts = [
                self._codes(name, max(begin - start, 0), min(end - start, count), columns)
                for name, start, count in zip(names, starts, rows, strict=True)
                if start < end and start + count > begin
            ]
            codes, scale = (torch.from_numpy(np.concatenate([part[index] for part in parts])) for index in (0, 1))
            lows = [part[2] for part in parts if part[2] is not None]
            low = torch.from_numpy(np.concatenate(lows)) if lows else None
            if order is not None:
                for part in (codes, scale, low):
                    if part is not None:
                        part[: len(order)] = part[order]
            yield begin, end, codes, scale, low

    def _codes(self, name: str, begin: int, end: int, columns: int) -> Parts:
        """Rows [begin, end) of a quantised tensor."""
        stored = self._tensors[name]
        if stored.quantised is not None:
            return self._codes_of(name, stored.quantised, begin, end)
        kind = BY_NAME[stored.dtype]
        row = columns // kind.elements * kind.size
        stride = stored.stride or row
        at = stored.begin + begin * stride
        size = (end - begin - 1) * stride + row
        mapped: Any = self._files.get(stored.file, stored.end)
        rows: Any = np.ndarray((end - begin, row), np.uint8, mapped, at, (stride, 1))
        blocks = rows.reshape(-1, kind.size)
        try:
            codes, scale, low = split(stored.dtype, blocks)
        except ValueError as problem:
            raise StartupError(f"{stored.file}: tensor {name}: {problem}") from None
        shape = (end - begin, columns // CODE_BLOCK)
        parts = (
            codes.reshape(end - begin, columns),
            scale.reshape(shape),
            low.reshape(shape) if low is not None else None,
        )
        self._let_go(stored, at, at + size)
        return parts

    def _codes_of(self, name: str, matrix: Quantised, begin: int, end: int) -> Parts:
        """Rows [begin, end) of a matrix that several tensors stand for."""
        kind = self.kept_kind(name)
        codes, scale, low = split(kind, self.kept_blocks(name, begin, end).reshape(-1, BY_NAME[kind].size))
        shape = (end - begin, matrix.shape[1] // CODE_BLOCK)
        own = low.reshape(shape) if low is not None else None
        return codes.reshape(end - begin, -1), scale.reshape(shape), own

"""Weights of a quantised checkpoint that stay codes with scales of float32, where a CPU has kernels for that.

Used at start, on the loading thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from engine.models.loading.weights import OUTPUT_WEIGHT, CheckpointWeights
from engine.models.parts.source import PREFIX
from engine.ops.coded import CodedLinear, Piece, can_keep_codes
from engine.ops.linear import Linear
from engine.ops.reordered import ReorderedLinear

_EMBEDDING = f"{PREFIX}embed_tokens.weight"
# Weights that are brought from one form into the other at once.
_PIECE = 1024 * 1024


class CodedWeights(CheckpointWeights):
    """CheckpointWeights with a CodedLinear for each layer whose parts can all be codes of one form."""

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
        self.round_layer(weights, dtype)
        form = self._common_form(weights, dtype or self.dtype)
        same, columns_order = self.input_order(weights) if form is not None else (False, None)
        if form is None or not same:
            return super().linear(names, rows, columns, bias=bias, order=order, activation=activation, dtype=dtype)
        bias_vector = self.stacked([f"{name}.bias" for name in names], rows, dtype=dtype) if bias else None
        if order is not None and bias_vector is not None:
            bias_vector[: len(order)] = bias_vector[order]
        pieces = self._pieces(weights, rows, columns, order)
        linear = CodedLinear(form, sum(rows), columns, dtype or self.dtype, pieces, bias_vector, activation)
        self.linears.append(linear)
        return linear if columns_order is None else ReorderedLinear(linear, columns_order)

    def round_layer(self, weights: Sequence[str], dtype: torch.dtype | None) -> None:
        """Round what a layer is made of, where that was asked for; one whose dtype is given is a router's."""
        if dtype is None:
            self.round(weights, as_output=list(weights) == [OUTPUT_WEIGHT])

    def output_layer(self, vocab: int, hidden: int, *, tied: bool, bias: bool = False) -> Linear:
        """See Weights.output_layer."""
        if tied:
            self.round([_EMBEDDING], as_output=True)
        form = self._common_form([_EMBEDDING], self.dtype) if tied else None
        if form is None or self.input_order([_EMBEDDING]) != (True, None):
            return super().output_layer(vocab, hidden, tied=tied, bias=bias)
        pieces = self._pieces([_EMBEDDING], [vocab], hidden, None)
        linear = CodedLinear(form, vocab, hidden, self.dtype, pieces)
        self.linears.append(linear)
        return linear

    def _common_form(self, names: Sequence[str], dtype: torch.dtype) -> str | None:
        """In what all of these can be kept, where a layer can be made of that; None where it cannot."""
        if not can_keep_codes(dtype, self.device):
            return None
        forms = {self.kept_form(name) for name in names}
        return forms.pop() if len(forms) == 1 else None

    def _pieces(self, names: Sequence[str], rows: Sequence[int], columns: int, order: Tensor | None) -> Iterator[Piece]:
        """The tensors below one another, in pieces that are small where no order mixes their rows."""
        total = sum(rows)
        step = CodedLinear.piece_rows(_PIECE // columns) if order is None else total
        starts = [sum(rows[:index]) for index in range(len(rows))]
        for begin in range(0, total, step):
            end = min(begin + step, total)
            parts = [
                self.kept_codes(name, max(begin - start, 0), min(end - start, count))
                for name, start, count in zip(names, starts, rows, strict=True)
                if start < end and start + count > begin
            ]
            codes, scale = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
            lows = [part[2] for part in parts if part[2] is not None]
            low = torch.cat(lows) if lows else None
            if order is not None:
                for part in (codes, scale, low):
                    if part is not None:
                        part[: len(order)] = part[order]
            yield begin, end, codes, scale, low

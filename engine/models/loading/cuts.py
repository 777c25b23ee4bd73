"""Parts of stored tensors: some rows, or some columns, of what a checkpoint holds, read without the rest of it.

Used at start, on the loading thread, by the ranks of a tensor parallel group (slices.py).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from torch import Tensor

from engine.config import StartupError
from engine.models.gguf.types import BY_NAME
from engine.models.loading.checkpoint import ITEM_BYTES, StoredTensor
from engine.models.loading.schemes.base import BLOCK, Coded, Mismatch, Quantised, View


@dataclass(frozen=True, slots=True)
class Cut:
    """Of a tensor of that shape: rows [begin, end), all of their columns, or the other way round (by_columns)."""

    shape: tuple[int, ...]
    begin: int
    end: int
    by_columns: bool = False

    @property
    def count(self) -> int:
        return self.end - self.begin

    def of(self, whole: Tensor) -> Tensor:
        """Those of a tensor that is in memory; a view."""
        return whole[:, self.begin : self.end] if self.by_columns else whole[self.begin : self.end]


def cut_out(name: str, stored: StoredTensor, cut: Cut) -> StoredTensor:
    """What is read in place of a tensor. Raises StartupError where the cut goes through a block of a quantised one."""
    shape = (stored.shape[0], cut.count) if cut.by_columns else (cut.count, *stored.shape[1:])
    if stored.quantised is not None:
        part = PartOf(stored.quantised, cut)
        return dataclasses.replace(stored, shape=shape, quantised=part)
    if stored.undo is not None or stored.shift or stored.stride:
        raise StartupError(
            f"{stored.file}: tensor {name} is kept in another order or form than the model's, in which "
            "--tensor-parallel-size cannot divide it so far"
        )
    if stored.transposed:
        # In the file rows are columns.
        item = ITEM_BYTES[stored.dtype]
        along, width = not cut.by_columns, stored.shape[0] * item
        before, piece = cut.begin * item, cut.count * item
        rows = stored.shape[1]
    else:
        along = cut.by_columns
        before, piece, width = _bytes(name, stored, cut)
        rows = stored.shape[0]
    if along:
        begin = stored.begin + before
        end = begin + (rows - 1) * width + piece if rows else begin
        return dataclasses.replace(stored, shape=shape, begin=begin, end=end, stride=width)
    begin = stored.begin + cut.begin * width
    return dataclasses.replace(stored, shape=shape, begin=begin, end=begin + cut.count * width)


def _bytes(name: str, stored: StoredTensor, cut: Cut) -> tuple[int, int, int]:
    """Of a row: those before the cut's columns, those of its columns, and all."""
    columns = math.prod(stored.shape[1:])
    if stored.dtype in ITEM_BYTES:
        item = ITEM_BYTES[stored.dtype]
        return cut.begin * item, cut.count * item, columns * item
    kind = BY_NAME[stored.dtype]
    if cut.by_columns and (cut.begin % kind.elements or cut.count % kind.elements):
        raise StartupError(through_block(f"{stored.file}: tensor {name}", stored.dtype, kind.elements, cut))
    each = kind.size / kind.elements
    return int(cut.begin * each), int(cut.count * each), int(columns * each)


def through_block(what: str, kind: str, elements: int, cut: Cut) -> str:
    """The line that says so."""
    return (
        f"{what} is in blocks of {elements} columns ({kind}), and a rank would have {cut.count} of its "
        f"{cut.shape[1]}: --tensor-parallel-size must leave blocks whole"
    )


class PartOf(Quantised):
    """A part of a matrix that several tensors stand for. Its columns are cut after they were read."""

    def __init__(self, inner: Quantised, cut: Cut) -> None:
        rows, columns = inner.shape
        super().__init__(inner.label, (rows, cut.count) if cut.by_columns else (cut.count, columns), inner.parts)
        self._inner = inner
        self._cut = cut
        self.code_group = inner.code_group
        self.float8_inputs = inner.float8_inputs

    def values(self, view: View, begin: int, end: int) -> Tensor:
        """See Quantised."""
        if self._cut.by_columns:
            return self._cut.of(self._inner.values(view, begin, end))
        return self._inner.values(view, self._cut.begin + begin, self._cut.begin + end)

    def kind(self, view: View) -> str | None:
        """See Quantised."""
        kind = self._inner.kind(view)
        if kind is None or not self._cut.by_columns:
            return kind
        if self._inner.order(view) is not None:
            return None  # a block's columns lie scattered
        if self._cut.begin % BLOCK or self._cut.count % BLOCK:
            raise Mismatch(through_block("it", kind, BLOCK, self._cut))
        return kind

    def order(self, view: View) -> Tensor | None:
        """See Quantised."""
        return None if self._cut.by_columns else self._inner.order(view)

    def blocks(self, view: View, begin: int, end: int) -> Tensor:
        """See Quantised."""
        if not self._cut.by_columns:
            return self._inner.blocks(view, self._cut.begin + begin, self._cut.begin + end)
        blocks = self._inner.blocks(view, begin, end)
        each = blocks.shape[1] // (self._inner.shape[1] // BLOCK)
        return blocks[:, self._cut.begin // BLOCK * each : self._cut.end // BLOCK * each].contiguous()

    def narrow(self) -> None:
        """See Quantised."""
        self._inner.narrow()

    def form(self, view: View) -> str | None:
        """See Quantised."""
        form = self._inner.form(view)
        if form is None or not self._cut.by_columns:
            return form
        whole = self._cut.begin % BLOCK == 0 and self._cut.count % BLOCK == 0
        return form if whole and self._inner.order(view) is None else None

    def table(self, view: View) -> Tensor | None:
        """See Quantised."""
        return self._inner.table(view)

    def coded(self, view: View, begin: int, end: int) -> Coded:
        """See Quantised."""
        if not self._cut.by_columns:
            return self._inner.coded(view, self._cut.begin + begin, self._cut.begin + end)
        codes, scale, added = self._inner.coded(view, begin, end)
        first, last = self._cut.begin // self.code_group, self._cut.end // self.code_group
        scale, added = scale[:, first:last], None if added is None else added[:, first:last]
        return self._cut.of(codes).contiguous(), scale.contiguous(), None if added is None else added.contiguous()

"""Quantised matrices made of others: some rows of one, two below one another, one with its columns as rows.

For experts, which some checkpoints hold as one tensor for a layer and others one by one, with gate and up apart or not.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from engine.models.loading.checkpoint import ITEM_BYTES, QUANTISED, StoredTensor
from engine.models.loading.schemes.base import Coded, Mismatch, Quantised, View
from engine.models.loading.schemes.floats import Float8Matrix


class RowsOf(Quantised):
    """`count` rows of another, from `first` on."""

    def __init__(self, inner: Quantised, first: int, count: int) -> None:
        super().__init__(inner.label, (count, inner.shape[1]), inner.parts)
        self._inner = inner
        self._first = first
        self.code_group = inner.code_group
        self.float8_inputs = inner.float8_inputs

    def values(self, view: View, begin: int, end: int) -> Tensor:
        """See Quantised."""
        return self._inner.values(view, self._first + begin, self._first + end)

    def kind(self, view: View) -> str | None:
        """See Quantised."""
        return self._inner.kind(view)

    def form(self, view: View) -> str | None:
        """See Quantised."""
        return self._inner.form(view)

    def table(self, view: View) -> Tensor | None:
        """See Quantised."""
        return self._inner.table(view)

    def narrow(self) -> None:
        """See Quantised."""
        self._inner.narrow()

    def order(self, view: View) -> Tensor | None:
        """See Quantised."""
        return self._inner.order(view)

    def blocks(self, view: View, begin: int, end: int) -> Tensor:
        """See Quantised."""
        return self._inner.blocks(view, self._first + begin, self._first + end)

    def coded(self, view: View, begin: int, end: int) -> Coded:
        """See Quantised."""
        return self._inner.coded(view, self._first + begin, self._first + end)


class Transposed(Quantised):
    """Another whose columns are the rows of this one."""

    def __init__(self, inner: Quantised) -> None:
        super().__init__(inner.label, inner.shape[::-1], inner.parts)
        self._inner = inner

    def values(self, view: View, begin: int, end: int) -> Tensor:
        """See Quantised."""
        return self._inner.values(view, 0, self.shape[1])[:, begin:end].T


class Below(Quantised):
    """One above another."""

    def __init__(self, above: Quantised, below: Quantised) -> None:
        if above.shape[1] != below.shape[1]:
            raise Mismatch(f"has {above.shape[1]} columns in one half and {below.shape[1]} in the other")
        parts: dict[str, StoredTensor] = {
            f"{number}{name}": part for number, each in enumerate((above, below)) for name, part in each.parts.items()
        }
        label = above.label if above.label == below.label else f"{above.label} and {below.label}"
        super().__init__(label, (above.shape[0] + below.shape[0], above.shape[1]), parts)
        self._halves = (above, below)
        self.code_group = above.code_group
        self.float8_inputs = above.float8_inputs and below.float8_inputs

    def values(self, view: View, begin: int, end: int) -> Tensor:
        """See Quantised."""
        return torch.cat([half.values(view, first, last) for half, first, last in self._ranges(begin, end)])

    def kind(self, view: View) -> str | None:
        """See Quantised."""
        first, second = (half.kind(view) for half in self._halves)
        in_order = all(half.order(view) is None for half in self._halves)
        return first if first == second and in_order else None

    def narrow(self) -> None:
        """See Quantised."""
        for half in self._halves:
            half.narrow()

    def form(self, view: View) -> str | None:
        """See Quantised."""
        first, second = ((half.form(view), half.code_group) for half in self._halves)
        in_order = all(half.order(view) is None for half in self._halves)
        above, below = (half.table(view) if first[0] == "table" else None for half in self._halves)
        alike = (above is None and below is None) or (
            above is not None and below is not None and torch.equal(above, below)
        )
        return first[0] if first == second and in_order and alike else None

    def table(self, view: View) -> Tensor | None:
        """See Quantised."""
        return self._halves[0].table(view)

    def coded(self, view: View, begin: int, end: int) -> Coded:
        """See Quantised."""
        parts = [half.coded(view, first, last) for half, first, last in self._ranges(begin, end)]
        lows = [part[2] for part in parts if part[2] is not None]
        return (
            torch.cat([part[0] for part in parts]),
            torch.cat([part[1] for part in parts]),
            torch.cat(lows) if lows else None,
        )

    def blocks(self, view: View, begin: int, end: int) -> Tensor:
        """See Quantised."""
        return torch.cat([half.blocks(view, first, last) for half, first, last in self._ranges(begin, end)])

    def _ranges(self, begin: int, end: int) -> list[tuple[Quantised, int, int]]:
        cut = self._halves[0].shape[0]
        each = ((self._halves[0], begin, min(end, cut)), (self._halves[1], max(begin - cut, 0), end - cut))
        return [(half, first, last) for half, first, last in each if first < last]


def float8_members(tensor: StoredTensor, scale: StoredTensor, block: tuple[int, int] | None) -> tuple[Quantised, ...]:
    """Every matrix of e4m3 [count, rows, columns], with its own scales or one for all. Raises Mismatch."""
    count, rows, columns = tensor.shape
    grid = scale.shape[1:] if len(scale.shape) == 3 else ()
    own = scale.shape[:1] == (count,) and (len(scale.shape) == 1 or len(grid) == 2)
    if not own and scale.shape not in ((), (1,)):
        raise Mismatch(f"has scales of shape {list(scale.shape)} for {count} matrices")
    high, wide = grid or (1, 1)
    if (high, wide) == (1, 1):
        size = (rows, columns)
    elif (
        high in (1, rows) and wide in (1, columns) and (block is None or (high, wide) != _counts(rows, columns, block))
    ):
        size = (rows // high, columns // wide)
    elif block is not None and (high, wide) == _counts(rows, columns, block):
        size = block
    else:
        wanted = f"; weight_block_size asks for {list(_counts(rows, columns, block))}" if block else ""
        raise Mismatch(f"has scales of shape {list(scale.shape)}{wanted}")
    found = []
    for number in range(count):
        codes = _slice(tensor, number, count, (rows, columns))
        each = _slice(scale, number, count, (high, wide)) if own else scale
        parts: Mapping[str, StoredTensor] = {".weight": codes, ".weight_scale": each}
        found.append(Float8Matrix("FP8 experts", parts, codes, each, size))
    return tuple(found)


def _counts(rows: int, columns: int, block: tuple[int, int]) -> tuple[int, int]:
    return -(-rows // block[0]), -(-columns // block[1])


def _slice(tensor: StoredTensor, number: int, count: int, shape: tuple[int, int]) -> StoredTensor:
    """One of the `count` matrices below one another."""
    size = math.prod(shape) * ITEM_BYTES[tensor.dtype]
    begin = tensor.begin + number * size
    assert begin + size <= tensor.end and count * size == tensor.end - tensor.begin
    return dataclasses.replace(tensor, shape=shape, begin=begin, end=begin + size)


def as_stored(matrix: Quantised) -> StoredTensor:
    """Begins at 0, for it lies in several places; as long as all of them together."""
    file = next(iter(matrix.parts.values())).file
    size = sum(part.end - part.begin for part in matrix.parts.values())
    return StoredTensor(file, QUANTISED, matrix.shape, 0, size, quantised=matrix)

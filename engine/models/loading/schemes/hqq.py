"""Checkpoints of HQQ in safetensors: groups run through the flat weight, and a group's zero is no integer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from engine.models.fields import Fields, show
from engine.models.loading.checkpoint import StoredTensor, read_integers
from engine.models.loading.schemes.base import (
    FLOATS,
    IntegerMatrix,
    Integers,
    Mismatch,
    Quantised,
    View,
    as_group,
    need,
)

CODES, SCALE, ZERO, SHAPE = ".W_q", ".scale", ".zero", ".shape"
BITS, SIZE, AXIS = ".nbits", ".group_size", ".axis"
# What a saved layer has beside them.
_OTHERS = (
    "packing", "view_as_float", "unpack_view_dtype", "optimize", "compute_dtype", "quant_scale", "quant_zero",
    "offload_meta", "stores_quant_config", "encoded_state_dict", "channel_wise", "round_zero",
)  # fmt: skip


class Hqq:
    """See base.Scheme."""

    suffixes = (CODES, SCALE, ZERO, SHAPE, BITS, SIZE, AXIS, ".weight", *(f".{name}" for name in _OTHERS))

    def __init__(self, config: Fields) -> None:
        self.config = config
        self._given = (config.nested("quant_config") or config).nested("weight_quant_params")

    def matrix(self, module: str, parts: Mapping[str, StoredTensor]) -> Quantised | None:
        """See base.Scheme."""
        if CODES not in parts:
            return None
        codes = need(module, parts, CODES, ("U8", "I32"))
        scale, zero = need(module, parts, SCALE, FLOATS), need(module, parts, ZERO, FLOATS)
        shape = read_integers(need(module, parts, SHAPE, ("I64", "I32")))
        if len(shape) != 2 or min(shape) < 1:
            raise Mismatch(f"tensor {module}{SHAPE} holds {shape}, where a matrix is needed")
        bits, axis = self._number(module, parts, BITS, "nbits"), self._number(module, parts, AXIS, "axis")
        if bits not in (2, 3, 4, 8) or axis not in (None, 0, 1):
            raise Mismatch(f"has {show(bits)} bits along axis {show(axis)}; 2, 3, 4 and 8 along 0 or 1 are read")
        rows, columns = shape
        groups = scale.end - scale.begin
        groups //= {"F32": 4}.get(scale.dtype, 2)
        if scale.shape != zero.shape or not groups or rows * columns % groups:
            raise Mismatch(f"tensors {module}{SCALE} and {ZERO} have shapes {list(scale.shape)} and {list(zero.shape)}")
        size = rows * columns // groups
        given = self._number(module, parts, SIZE, "group_size")
        if given is not None and given != size:
            raise Mismatch(f"has groups of {size}, where its group_size is {given}")
        # The rows of the matrix that was packed: a group each, or the elements of one.
        high = groups if axis in (None, 1) else size
        across = rows * columns // high
        packed = (codes.end - codes.begin) // (4 if codes.dtype == "I32" else 1)
        each = 10 if bits == 3 else 8 // bits
        if packed != -(-high // each) * across or (bits == 3) != (codes.dtype == "I32"):
            raise Mismatch(
                f"tensor {module}{CODES} has {packed} numbers, where {bits} bits take {-(-high // each) * across}"
            )
        if axis in (None, 1) and columns % size == 0:
            as_group(columns, columns // size, size)
            return _Rows(f"int{bits} by {size}", (rows, columns), parts, bits, size)
        return _Flat(f"int{bits} by {size}", (rows, columns), parts, bits, axis != 0, groups)

    def _number(self, module: str, parts: Mapping[str, StoredTensor], suffix: str, name: str) -> Any:
        """Of the layer, or else of config.json. Raises Mismatch."""
        if suffix in parts:
            stored = need(module, parts, suffix, ("I64", "I32", "U8", "I8"))
            found = read_integers(stored)
            if len(found) != 1:
                raise Mismatch(f"tensor {module}{suffix} holds {len(found)} numbers")
            return found[0]
        return self._given.raw(name) if self._given is not None else None


def _opened(packed: Tensor, bits: int, first: int, last: int, high: int) -> Tensor:
    """Rows [first, last) of the `high` that `packed` [rows, across] holds, uint8; the bits hold a part of them each."""
    each = 10 if bits == 3 else 8 // bits
    part = len(packed)
    row = torch.arange(first, last)
    shifts = (each - 1 - row // part) * bits
    assert last <= high <= each * part
    return ((packed[row % part].int() >> shifts[:, None].int()) & ((1 << bits) - 1)).to(torch.uint8)


class _Rows(IntegerMatrix):
    """Groups that do not cross rows."""

    def zeros(self, view: View) -> Tensor | None:
        """See IntegerMatrix."""
        return view(self.parts[ZERO]).float() - (1 << (self.bits - 1))

    def scales(self, view: View) -> Tensor:
        """See IntegerMatrix."""
        return view(self.parts[SCALE])

    def integers(self, view: View, begin: int, end: int) -> Integers:
        """See IntegerMatrix."""
        rows, columns = self.shape
        own = columns // self.group
        packed = view(self.parts[CODES]).view(-1, self.group)
        codes = _opened(packed, self.bits, begin * own, end * own, rows * own).view(-1, columns)
        middle = 1 << (self.bits - 1)
        zero = view(self.parts[ZERO]).float().view(rows, own)[begin:end] - middle
        scale = view(self.parts[SCALE]).float().view(rows, own)[begin:end]
        return Integers((codes.to(torch.int16) - middle).to(torch.int8), zero, scale)


class _Flat(Quantised):
    """Groups that do: those of the flat weight, or every so many of its elements."""

    def __init__(
        self,
        label: str,
        shape: tuple[int, int],
        parts: Mapping[str, StoredTensor],
        bits: int,
        lengthwise: bool,
        groups: int,
    ) -> None:
        super().__init__(label, shape, parts)
        self._bits = bits
        self._lengthwise = lengthwise
        self._groups = groups

    def values(self, view: View, begin: int, end: int) -> Tensor:
        """See Quantised."""
        rows, columns = self.shape
        size = rows * columns // self._groups
        scale = view(self.parts[SCALE]).float().view(-1)
        zero = view(self.parts[ZERO]).float().view(-1)
        if not bool((scale.isfinite() & zero.isfinite()).all()):
            raise Mismatch("a scale is no finite number")
        high, across = (self._groups, size) if self._lengthwise else (size, self._groups)
        first, last = begin * columns // across, -(-end * columns // across)
        codes = _opened(view(self.parts[CODES]).view(-1, across), self._bits, first, last, high).float()
        if self._lengthwise:
            values = (codes - zero[first:last, None]) * scale[first:last, None]
        else:
            values = (codes - zero) * scale
        start = begin * columns - first * across
        return values.view(-1)[start : start + (end - begin) * columns].view(-1, columns)

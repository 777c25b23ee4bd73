"""Checkpoints of bitsandbytes: bytes with a scale for every row, or halves of bytes that are places in a table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from engine.models.fields import Fields, show
from engine.models.loading.checkpoint import StoredTensor, read_bytes
from engine.models.loading.schemes.base import (
    BLOCK,
    Coded,
    IntegerMatrix,
    Integers,
    Mismatch,
    Quantised,
    View,
    expect,
    need,
)

WEIGHT, ROWS = ".weight", ".SCB"
LARGEST, TABLE = ".weight.absmax", ".weight.quant_map"
NESTED, NESTED_TABLE = ".weight.nested_absmax", ".weight.nested_quant_map"
STATES = (".weight.quant_state.bitsandbytes__nf4", ".weight.quant_state.bitsandbytes__fp4")
MAX_STATE = 65536


class BitsAndBytes:
    """See base.Scheme."""

    suffixes = (WEIGHT, ROWS, LARGEST, TABLE, NESTED, NESTED_TABLE, *STATES, ".weight_format", ".weight.SCB")

    def __init__(self, config: Fields) -> None:
        self.config = config

    def matrix(self, module: str, parts: Mapping[str, StoredTensor]) -> Quantised | None:
        """See base.Scheme."""
        state = next((each for each in STATES if each in parts), None)
        if state is not None:
            return _four_bits(module, parts, state)
        rows = next((each for each in (ROWS, ".weight.SCB") if each in parts), None)
        if rows is None:
            return None
        weight, scale = need(module, parts, WEIGHT, ("I8",)), need(module, parts, rows, ("F32",))
        if len(weight.shape) != 2 or 0 in weight.shape:
            raise Mismatch(f"has shape {list(weight.shape)}, where a matrix is needed")
        expect(module, rows, scale, (weight.shape[0],))
        return _Rows(parts, weight, scale)


def _four_bits(module: str, parts: Mapping[str, StoredTensor], suffix: str) -> Quantised:
    stored = need(module, parts, suffix, ("U8",))
    if stored.end - stored.begin > MAX_STATE:
        raise Mismatch(f"tensor {module}{suffix} has {stored.end - stored.begin} bytes")
    try:
        state: Any = json.loads(read_bytes(stored))
    except (ValueError, RecursionError):
        raise Mismatch(f"tensor {module}{suffix} is not valid JSON") from None
    shape, block = (state.get(name) for name in ("shape", "blocksize")) if isinstance(state, dict) else (None, None)
    if not isinstance(shape, list) or len(shape) != 2 or any(type(each) is not int or each < 1 for each in shape):
        raise Mismatch(f"its quant_state has the shape {show(shape)}, where a matrix is needed")
    if type(block) is not int or not 1 <= block <= 1 << 20:
        raise Mismatch(f"its quant_state has the blocksize {show(block)}")
    rows, columns = shape
    count = rows * columns
    blocks = -(-count // block)
    weight, table = need(module, parts, WEIGHT, ("U8", "I8")), need(module, parts, TABLE, ("F32",))
    if weight.end - weight.begin != -(-count // 2):
        raise Mismatch(
            f"tensor {module}{WEIGHT} has {weight.end - weight.begin} bytes; {shape} in its quant_state takes "
            f"{-(-count // 2)}"
        )
    expect(module, TABLE, table, (16,))
    largest = need(module, parts, LARGEST, ("U8", "F32"))
    expect(module, LARGEST, largest, (blocks,))
    nested_block, offset = 1, 0.0
    if largest.dtype == "U8":
        nested_block, offset = state.get("nested_blocksize"), state.get("nested_offset")
        if type(nested_block) is not int or nested_block < 1 or not isinstance(offset, int | float):
            raise Mismatch("its quant_state says nothing of nested_blocksize and nested_offset")
        expect(module, NESTED, need(module, parts, NESTED, ("F32",)), (-(-blocks // nested_block),))
        expect(module, NESTED_TABLE, need(module, parts, NESTED_TABLE, ("F32",)), (256,))
    kind = suffix.rpartition("__")[2]
    return _FourBits(f"{kind} by {block}", (rows, columns), parts, block, nested_block, float(offset))


class _Rows(IntegerMatrix):
    """Bytes: the largest of a row is 127."""

    def __init__(self, parts: Mapping[str, StoredTensor], weight: StoredTensor, scale: StoredTensor) -> None:
        rows, columns = weight.shape
        super().__init__("int8 by row", (rows, columns), parts, 8, columns)
        self._weight = weight
        self._scale = scale

    def zeros(self, view: View) -> Tensor | None:
        """See IntegerMatrix."""
        return None

    def scales(self, view: View) -> Tensor:
        """See IntegerMatrix."""
        return view(self._scale).float() / 127

    def integers(self, view: View, begin: int, end: int) -> Integers:
        """See IntegerMatrix."""
        scale = view(self._scale)[begin:end, None].float() / 127
        return Integers(view(self._weight)[begin:end], None, scale)


class _FourBits(Quantised):
    """Places in a table of 16 numbers, the first of two in the high half, times the largest of every `block`.

    They lie row by row, and a block may begin within a row. Scales may be places in a table themselves.
    """

    def __init__(
        self,
        label: str,
        shape: tuple[int, int],
        parts: Mapping[str, StoredTensor],
        block: int,
        nested_block: int,
        offset: float,
    ) -> None:
        super().__init__(label, shape, parts)
        self._block = block
        self._nested_block = nested_block
        self._offset = offset

    def values(self, view: View, begin: int, end: int) -> Tensor:
        """See Quantised."""
        columns = self.shape[1]
        first, last = begin * columns, end * columns
        values = view(self.parts[TABLE])[self._places(view, first, last).int()]
        scales = self._scales(view, first // self._block, -(-last // self._block))
        if first % self._block == last % self._block == 0:
            values.view(-1, self._block).mul_(scales[:, None])
        else:
            values *= scales[torch.arange(first, last) // self._block - first // self._block]
        if not bool(values.isfinite().all()):
            raise Mismatch("a scale is no finite number")
        return values.view(-1, columns)

    def form(self, view: View) -> str | None:
        """See Quantised."""
        return "table" if self.shape[1] % BLOCK == self._block % BLOCK == 0 else None

    def table(self, view: View) -> Tensor | None:
        """See Quantised."""
        found = view(self.parts[TABLE])
        if not bool(found.isfinite().all()):
            raise Mismatch("a number of its table is not finite")
        return found

    def coded(self, view: View, begin: int, end: int) -> Coded:
        """See Quantised. A block of columns has the scale of the block of numbers that it is part of."""
        rows, columns = end - begin, self.shape[1]
        first, last = begin * columns, end * columns
        scales = self._scales(view, first // self._block, -(-last // self._block))
        if not bool(scales.isfinite().all()):
            raise Mismatch("a scale is no finite number")
        own = scales[torch.arange(first, last, BLOCK) // self._block - first // self._block]
        return self._places(view, first, last).view(rows, columns), own.view(rows, -1), None

    def _places(self, view: View, first: int, last: int) -> Tensor:
        """uint8 [last - first], of these numbers."""
        packed = view(self.parts[WEIGHT]).view(-1).view(torch.uint8)[first // 2 : -(-last // 2)]
        return torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[first % 2 : first % 2 + last - first]

    def _scales(self, view: View, first: int, last: int) -> Tensor:
        """float32 [last - first], of these blocks."""
        own = view(self.parts[LARGEST])[first:last]
        if own.dtype != torch.uint8:
            return own
        outer = view(self.parts[NESTED])[torch.arange(first, last) // self._nested_block]
        return view(self.parts[NESTED_TABLE])[own.int()] * outer + self._offset

"""Checkpoints of torchao in safetensors: the inner tensors of every quantised one; the metadata say its kind."""

from __future__ import annotations

import json
from collections.abc import Mapping

from torch import Tensor

from engine.models.fields import Fields, show
from engine.models.loading.checkpoint import StoredTensor, read_metadata
from engine.models.loading.schemes.base import (
    FLOATS,
    IntegerMatrix,
    Integers,
    Mismatch,
    Quantised,
    View,
    as_group,
    expect,
    need,
)
from engine.models.loading.schemes.floats import Float8Matrix

CODES, SCALE, ZERO = "._weight_qdata", "._weight_scale", "._weight_zero_point"
# Kinds whose matrix is in its own shape, a number in each element.
KINDS = ("IntxUnpackedToInt8Tensor", "Int8Tensor", "Float8Tensor", "LinearActivationQuantizedTensor")


class Torchao:
    """See base.Scheme."""

    suffixes = (CODES, SCALE, ZERO, ".weight", "._weight_act_quant_scale", "._weight_act_pre_scale")

    def __init__(self, config: Fields) -> None:
        self.config = config

    def matrix(self, module: str, parts: Mapping[str, StoredTensor]) -> Quantised | None:
        """See base.Scheme."""
        if CODES not in parts:
            return None
        codes, scale = parts[CODES], need(module, parts, SCALE, FLOATS)
        kind = _kind(module, codes)
        if kind not in (None, *KINDS) or codes.dtype not in ("I8", "F8_E4M3") or "._weight_act_pre_scale" in parts:
            raise Mismatch(f"is a {kind or 'tensor'} in {codes.dtype}; only {', '.join(KINDS)} are read")
        if len(codes.shape) != 2 or 0 in codes.shape:
            raise Mismatch(f"has shape {list(codes.shape)}, where a matrix is needed")
        rows, columns = codes.shape
        shape = scale.shape or (1,)
        if (shape not in ((1,), (1, 1)) and shape[0] != rows) or len(shape) > 2:
            expect(module, SCALE, scale, (rows, 1))
        count = shape[1] if len(shape) == 2 else 1
        size = as_group(columns, count, None)
        if codes.dtype == "F8_E4M3":
            block = (rows, columns) if shape in ((1,), (1, 1)) and rows > 1 else (1, size)
            return Float8Matrix("FP8", parts, codes, scale, block)
        if ZERO in parts:
            zero = need(module, parts, ZERO, ("I8", "I32", "I64", *FLOATS))
            expect(module, ZERO, zero, scale.shape)
        return _Bytes(f"int by {size}" if count > 1 else "int8 by row", (rows, columns), parts, 8, size)


def _kind(module: str, codes: StoredTensor) -> str | None:
    """The class of the tensor, as the metadata of its file has it. Raises Mismatch."""
    told = read_metadata(codes.file).get(f"{module}.weight")
    if told is None:
        return None
    try:
        found = json.loads(told)
    except (ValueError, RecursionError):
        found = None
    kind = found.get("_type") if isinstance(found, dict) else None
    if not isinstance(kind, str):
        raise Mismatch(f"the file's metadata says {show(told)} of it, which names no kind of tensor")
    return kind


class _Bytes(IntegerMatrix):
    """A byte each, whatever its bits."""

    def zeros(self, view: View) -> Tensor | None:
        """See IntegerMatrix."""
        return view(self.parts[ZERO]) if ZERO in self.parts else None

    def scales(self, view: View) -> Tensor:
        """See IntegerMatrix."""
        return view(self.parts[SCALE])

    def integers(self, view: View, begin: int, end: int) -> Integers:
        """See IntegerMatrix."""
        zero = self._spread_out(view(self.parts[ZERO]))[begin:end] if ZERO in self.parts else None
        scale = self._spread_out(view(self.parts[SCALE]).float())[begin:end]
        return Integers(view(self.parts[CODES])[begin:end], zero, scale)

    def _spread_out(self, numbers: Tensor) -> Tensor:
        """[rows, groups]."""
        rows = self.shape[0]
        return numbers.view(1, 1).expand(rows, 1) if numbers.numel() == 1 else numbers.view(rows, -1)

"""Checkpoints of NVIDIA's modelopt: float8, NVFP4, and integers; which of them a layer is, its tensors say."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from engine.models.fields import Fields
from engine.models.loading.checkpoint import StoredTensor
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
from engine.models.loading.schemes.floats import EXPONENTS, Float4Matrix, Float8Matrix
from engine.models.loading.schemes.names import fits_wildcard

WEIGHT, SCALE, GLOBAL, BEFORE = ".weight", ".weight_scale", ".weight_scale_2", ".pre_quant_scale"
# Of the blocks in which float8 has scales; the file does not say it.
BLOCK = 128


class Modelopt:
    """See base.Scheme."""

    suffixes = (WEIGHT, SCALE, GLOBAL, BEFORE)

    def __init__(self, config: Fields) -> None:
        self.config = config.nested("quantization") or config
        self._ignored = (*self.config.words("ignore"), *self.config.words("exclude_modules"))

    def matrix(self, module: str, parts: Mapping[str, StoredTensor]) -> Quantised | None:
        """See base.Scheme."""
        if SCALE not in parts:
            return None
        if fits_wildcard(self._ignored, module):
            raise Mismatch(f"has scales, but config.json leaves {module} out")
        weight = need(module, parts, WEIGHT, ("F8_E4M3", "U8", "I8"))
        scale = need(module, parts, SCALE, (*FLOATS, "F8_E4M3", *EXPONENTS))
        if len(weight.shape) != 2 or 0 in weight.shape:
            raise Mismatch(f"has shape {list(weight.shape)}, where a matrix is needed")
        before = parts.get(BEFORE)
        if weight.dtype == "F8_E4M3":
            found = self._float8(module, parts, weight, scale)
            columns = weight.shape[1]
        elif weight.dtype == "U8" and scale.dtype == "F8_E4M3":
            columns = 2 * weight.shape[1]
            found = self._nvfp4(module, parts, weight, scale)
        elif weight.dtype == "U8":
            columns = weight.shape[1]
            shape = (2 * weight.shape[0], columns)
            if len(scale.shape) != 2 or scale.shape[0] != shape[0]:
                expect(module, SCALE, scale, (shape[0], -(-columns // BLOCK)))
            size = as_group(columns, scale.shape[1], None)
            found = _RowPairs(f"int4 by {size}", shape, parts, 4, size)
        else:
            columns = weight.shape[1]
            expect(module, SCALE, scale, (weight.shape[0],), (weight.shape[0], 1), ())
            found = _Rows("int8 by row", (weight.shape[0], columns), parts, 8, columns)
        if before is not None:
            need(module, parts, BEFORE, FLOATS)
            expect(module, BEFORE, before, (columns,))
            found = _Before(found, before)
        return found

    def _float8(
        self, module: str, parts: Mapping[str, StoredTensor], weight: StoredTensor, scale: StoredTensor
    ) -> Quantised:
        rows, columns = weight.shape
        if scale.shape in ((), (1,)):
            return Float8Matrix("FP8 by tensor", parts, weight, scale, (rows, columns), float8_inputs=True)
        if scale.shape in ((rows,), (rows, 1)):
            return Float8Matrix("FP8 by row", parts, weight, scale, (1, columns), float8_inputs=True)
        if scale.dtype in EXPONENTS:
            expect(module, SCALE, scale, (rows, -(-columns // 32)))
            return Float8Matrix("MXFP8", parts, weight, scale, (1, 32))
        high, wide = -(-rows // BLOCK), -(-columns // BLOCK)
        expect(module, SCALE, scale, (high, 1, wide, 1), (high, wide))
        return Float8Matrix("FP8 by block", parts, weight, scale, (BLOCK, BLOCK))

    def _nvfp4(
        self, module: str, parts: Mapping[str, StoredTensor], weight: StoredTensor, scale: StoredTensor
    ) -> Quantised:
        rows, columns = weight.shape[0], 2 * weight.shape[1]
        if columns % 16:
            raise Mismatch(f"groups of 16 do not divide its {columns} columns")
        expect(module, SCALE, scale, (rows, columns // 16))
        factor = need(module, parts, GLOBAL, FLOATS)
        expect(module, GLOBAL, factor, (), (1,))
        return Float4Matrix("NVFP4", parts, weight, scale, 16, factor)


class _RowPairs(IntegerMatrix):
    """Four bits with a sign: a byte holds numbers of two rows, the first one low."""

    def zeros(self, view: View) -> Tensor | None:
        """See IntegerMatrix."""
        return None

    def scales(self, view: View) -> Tensor:
        """See IntegerMatrix."""
        return view(self.parts[SCALE])

    def integers(self, view: View, begin: int, end: int) -> Integers:
        """See IntegerMatrix."""
        first, last = begin // 2, -(-end // 2)
        packed = view(self.parts[WEIGHT])[first:last]
        pairs = torch.stack([packed & 15, packed >> 4], dim=1).view(-1, self.shape[1])
        codes: Tensor = ((pairs.to(torch.int8) ^ 8) - 8)[begin - 2 * first : end - 2 * first]
        return Integers(codes, None, view(self.parts[SCALE])[begin:end].float())


class _Rows(IntegerMatrix):
    """A byte each, with a scale for a row."""

    def zeros(self, view: View) -> Tensor | None:
        """See IntegerMatrix."""
        return None

    def scales(self, view: View) -> Tensor:
        """See IntegerMatrix."""
        return view(self.parts[SCALE])

    def integers(self, view: View, begin: int, end: int) -> Integers:
        """See IntegerMatrix."""
        scale = view(self.parts[SCALE]).float().view(-1, 1).expand(self.shape[0], 1)
        return Integers(view(self.parts[WEIGHT])[begin:end], None, scale[begin:end])


class _Before(Quantised):
    """A matrix whose input is multiplied by numbers of its own first: here its columns are."""

    def __init__(self, inner: Quantised, before: StoredTensor) -> None:
        super().__init__(f"{inner.label}, scaled inputs", inner.shape, inner.parts)
        self._inner = inner
        self._before = before

    def values(self, view: View, begin: int, end: int) -> Tensor:
        """See Quantised."""
        factors = view(self._before).float()
        if not bool(factors.isfinite().all()):
            raise Mismatch("a scale is no finite number")
        return self._inner.values(view, begin, end) * factors

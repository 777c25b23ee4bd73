"""Matrices of small floats: e4m3 in tensors, rows or blocks that share a scale, and e2m1 in groups of 16 or 32."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from engine.models.loading.checkpoint import StoredTensor
from engine.models.loading.schemes.base import BLOCK, Coded, Mismatch, Quantised, View, halves

_MOST = torch.finfo(torch.float32).max
# Of a scale that is an exponent alone.
EXPONENTS = ("U8", "F8_E8M0")
# e2m1: by the code without its sign, and with it.
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES = torch.tensor([*_MAGNITUDES, *(-each for each in _MAGNITUDES)])


def from_exponents(codes: Tensor) -> Tensor:
    """uint8 or float8_e8m0fnu -> float32: 2^(code - 127), and 255 is no number."""
    return codes.view(torch.uint8).view(torch.float8_e8m0fnu).float()


def scales_of(view: View, stored: StoredTensor) -> Tensor:
    """float32, whatever they are stored as."""
    found = view(stored)
    return from_exponents(found) if stored.dtype in EXPONENTS else found.float()


class Float8Matrix(Quantised):
    """e4m3 [rows, columns] times scales, of which each is of a block of so many rows and columns."""

    def __init__(
        self,
        label: str,
        parts: Mapping[str, StoredTensor],
        codes: StoredTensor,
        scale: StoredTensor,
        block: tuple[int, int],
        *,
        float8_inputs: bool = False,
    ) -> None:
        rows, columns = codes.shape
        super().__init__(label, (rows, columns), parts)
        self.float8_inputs = float8_inputs and block[1] >= columns
        self._codes = codes
        self._scale = scale
        self._block = block

    def values(self, view: View, begin: int, end: int) -> Tensor:
        """See Quantised."""
        wide = self._block[1]
        values = view(self._codes)[begin:end].float()
        own = self._own_scales(view, begin, end)
        for number in range(own.shape[1]):
            part = values[:, number * wide : (number + 1) * wide]
            if bool((part[own[:, number] == 0] != 0).any()):
                raise Mismatch("a scale is zero where its weights are not")
            part.mul_(own[:, number, None])
        if not bool(values.isfinite().all()):
            raise Mismatch("a weight is no finite number")
        return values

    def form(self, view: View) -> str | None:
        """See Quantised."""
        columns, wide = self.shape[1], self._block[1]
        return "e4m3" if columns % BLOCK == 0 and (wide % BLOCK == 0 or wide >= columns) else None

    def coded(self, view: View, begin: int, end: int) -> Coded:
        """See Quantised."""
        codes = view(self._codes)[begin:end].view(torch.uint8)
        own = self._own_scales(view, begin, end)[:, torch.arange(self.shape[1] // BLOCK) * BLOCK // self._block[1]]
        check_e4m3(codes, own)
        return codes, own, None

    def _own_scales(self, view: View, begin: int, end: int) -> Tensor:
        """float32 [rows, blocks of columns], checked."""
        high, wide = self._block
        rows, columns = self.shape
        scales = scales_of(view, self._scale).reshape(-(-rows // high), -(-columns // wide))
        own = scales[torch.arange(begin, end) // high]
        check_scales(own)
        return own


class Float4Matrix(Quantised):
    """e2m1 [rows, columns / 2], the first of two in the low half of a byte, times scales of `group` columns.

    factor: a number for all of it. divides: by which scales are divided.
    """

    def __init__(
        self,
        label: str,
        parts: Mapping[str, StoredTensor],
        codes: StoredTensor,
        scale: StoredTensor,
        group: int,
        factor: StoredTensor | None = None,
        divides: bool = False,
    ) -> None:
        rows, half = codes.shape
        super().__init__(label, (rows, 2 * half), parts)
        self._codes = codes
        self._scale = scale
        self._group = group
        self._factor = factor
        self._divides = divides
        self.code_group = group

    def values(self, view: View, begin: int, end: int) -> Tensor:
        """See Quantised."""
        rows, columns = end - begin, self.shape[1]
        numbers = VALUES[self._nibbles(view, begin, end).int()]
        return numbers.view(rows, -1, self._group).mul_(self._scales(view, begin, end)[:, :, None]).view(rows, columns)

    def kind(self, view: View) -> str | None:
        """See Quantised."""
        return "MXFP4" if self._group == BLOCK and self._scale.dtype in EXPONENTS and self._factor is None else None

    def blocks(self, view: View, begin: int, end: int) -> Tensor:
        """See Quantised."""
        self._scales(view, begin, end)  # checked
        exponents = view(self._scale)[begin:end].view(torch.uint8).unsqueeze(-1)
        codes = self._nibbles(view, begin, end).view(end - begin, -1, BLOCK)
        return torch.cat((exponents, halves(codes)), -1).view(end - begin, -1)

    def form(self, view: View) -> str | None:
        """See Quantised."""
        return "e2m1"

    def coded(self, view: View, begin: int, end: int) -> Coded:
        """See Quantised."""
        return self._nibbles(view, begin, end), self._scales(view, begin, end), None

    def _nibbles(self, view: View, begin: int, end: int) -> Tensor:
        """uint8 [rows, columns]: codes."""
        packed = view(self._codes)[begin:end].view(torch.uint8)
        return torch.stack([packed & 15, packed >> 4], dim=2).view(end - begin, -1)

    def _scales(self, view: View, begin: int, end: int) -> Tensor:
        """float32 [rows, groups]."""
        own = view(self._scale)[begin:end]
        scales = from_exponents(own) if self._scale.dtype in EXPONENTS else own.float()
        if self._factor is not None:
            factor = view(self._factor).float().view(-1)
            if not bool(factor.isfinite().all()) or bool((factor == 0).any()):
                raise Mismatch("its global scale is zero or no finite number")
            scales = scales / factor if self._divides else scales * factor
        check_scales(scales)
        return scales


def check_e4m3(codes: Tensor, scales: Tensor) -> None:
    """Raise Mismatch for codes uint8 [rows, columns] that are no numbers, or have a scale [rows, blocks] of zero."""
    sizes = codes & 0x7F
    if bool((sizes == 0x7F).any()):
        raise Mismatch("a weight is no finite number")
    if bool(((scales == 0) & (sizes.view(*scales.shape, -1).amax(-1) != 0)).any()):
        raise Mismatch("a scale is zero where its weights are not")
    if float(scales.abs().max()) > _MOST / 448:
        raise Mismatch("a weight is no finite number")


def check_scales(scales: Tensor) -> None:
    """Raise Mismatch for scales that are no numbers."""
    if not bool(scales.isfinite().all()):
        raise Mismatch("a scale is no finite number")

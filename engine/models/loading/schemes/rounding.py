"""Weights that a checkpoint has as floating-point numbers, rounded to integers with a scale for every few columns, or
to floats of eight bits with one for every row.

The scale of a group is the one, of several, that leaves the least squared error: a little less than the largest weight
asks for costs that one and serves the others. Used at start, on the loading thread, and by engine/quantise.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.models.loading.checkpoint import StoredTensor
from engine.models.loading.schemes.base import BLOCK, FLOATS, Coded, Mismatch, Quantised, View, to_blocks

# By the names of --quantization, of integers: bits, and the blocks that layers keep.
KINDS = {"int8": (8, "Q8_0"), "int4": (4, "Q4_0")}
# Largest number of e4m3.
FP8_MOST = 448.0
# Scales that are tried, as parts of the one that reaches the largest weight.
PARTS = {8: (1.0,), 4: (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 1.04)}
# Weights that are rounded at once.
PIECE = 128 * 1024


def rounded(groups: Tensor, bits: int, dtype: torch.dtype, *, signs: bool) -> tuple[Tensor, Tensor]:
    """float32 [n, columns] -> codes int8 of the same shape, scales float32 [n] that `dtype` can hold.

    signs: a scale may be negative, so that the largest weight can be the end of the range that reaches further.
    Raises Mismatch for weights that are no numbers, or too large.
    """
    found = [_rounded(each, bits, dtype, signs) for each in torch.split(groups, max(1, PIECE // groups.shape[1]))]
    return torch.cat([codes for codes, _ in found]), torch.cat([scales for _, scales in found])


def _rounded(groups: Tensor, bits: int, dtype: torch.dtype, signs: bool) -> tuple[Tensor, Tensor]:
    """The same of so few that they stay in the processor's caches."""
    end = 1 << (bits - 1)
    high, low = groups.amax(1), groups.amin(1)
    largest = torch.where(high > -low, high, low)
    whole = largest / -end if signs else largest.abs() / (end - 0.5)
    if not bool(largest.isfinite().all()):
        raise Mismatch("a weight is no finite number")
    best, least = None, torch.full_like(whole, torch.inf)
    for part in PARTS.get(bits, (1.0,)):
        scale = (whole * part).to(dtype).float()
        if not bool(scale.isfinite().all()):
            raise Mismatch("a weight is too large to be rounded")
        found = (groups * torch.where(scale == 0, 0.0, 1 / scale)[:, None]).round_().clamp_(-end, end - 1)
        error = (found * scale[:, None]).sub_(groups).square_().sum(1)
        best = scale if best is None else torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    assert best is not None
    codes = (groups * torch.where(best == 0, 0.0, 1 / best)[:, None]).round_().clamp_(-end, end - 1)
    return codes.to(torch.int8), best


def rounded_float8(weights: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [rows, columns] -> float8_e4m3fn of the same shape, and a scale for each row, float32 [rows] that
    bfloat16 can hold. Raises Mismatch for weights that are no numbers."""
    scale = (weights.abs().amax(1) / FP8_MOST).bfloat16().float()
    if not bool(scale.isfinite().all()):
        raise Mismatch("a weight is no finite number")
    inverse = torch.where(scale == 0, 0.0, 1 / scale)[:, None]
    return (weights * inverse).clamp_(-FP8_MOST, FP8_MOST).to(torch.float8_e4m3fn), scale


class Rounded(Quantised):
    """A matrix of floating-point numbers as integers in blocks of 32 columns. name: one of KINDS."""

    def __init__(self, stored: StoredTensor, name: str) -> None:
        rows, columns = stored.shape
        self._bits, self._kind = KINDS[name]
        super().__init__(name, (rows, columns), {".weight": stored})

    def kind(self, view: View) -> str | None:
        """See Quantised."""
        return self._kind

    def blocks(self, view: View, begin: int, end: int) -> Tensor:
        """See Quantised."""
        codes, scales = self._rounded(view, begin, end)
        numbers = codes.view(end - begin, -1, BLOCK)
        return to_blocks(self._kind, numbers, scales.view(end - begin, -1)).view(end - begin, -1)

    def form(self, view: View) -> str | None:
        """See Quantised."""
        return "int8" if self._bits == 8 else "int4"

    def coded(self, view: View, begin: int, end: int) -> Coded:
        """See Quantised."""
        codes, scales = self._rounded(view, begin, end)
        codes = codes if self._bits == 8 else codes + 8
        return codes.view(end - begin, -1).view(torch.uint8), scales.view(end - begin, -1), None

    def values(self, view: View, begin: int, end: int) -> Tensor:
        """See Quantised."""
        codes, scales = self._rounded(view, begin, end)
        return (codes * scales[:, None]).view(end - begin, -1)

    def _rounded(self, view: View, begin: int, end: int) -> tuple[Tensor, Tensor]:
        rows = _rows(self, view, begin, end)
        return rounded(rows.view(-1, BLOCK), self._bits, torch.float16, signs=True)


class RoundedFloat8(Quantised):
    """A matrix of floating-point numbers as e4m3."""

    def __init__(self, stored: StoredTensor) -> None:
        rows, columns = stored.shape
        super().__init__("fp8", (rows, columns), {".weight": stored})

    def form(self, view: View) -> str | None:
        """See Quantised."""
        return "e4m3"

    def coded(self, view: View, begin: int, end: int) -> Coded:
        """See Quantised."""
        codes, scale = rounded_float8(_rows(self, view, begin, end))
        return codes.view(torch.uint8), scale[:, None].expand(-1, self.shape[1] // BLOCK), None

    def values(self, view: View, begin: int, end: int) -> Tensor:
        """See Quantised."""
        codes, scale = rounded_float8(_rows(self, view, begin, end))
        return codes.float() * scale[:, None]


def _rows(matrix: Quantised, view: View, begin: int, end: int) -> Tensor:
    """Rows of what it is made of, float32."""
    stored = matrix.parts[".weight"]
    whole = view(stored)
    # A tensor that lies in the file column by column is told by its shape after all.
    rows = whole.view(matrix.shape[::-1]).T[begin:end] if stored.transposed else whole[begin:end]
    return rows.float().contiguous()


def can_round(stored: StoredTensor) -> bool:
    """Whether it is a matrix of floating-point numbers that blocks divide, as it lies in the file."""
    plain = stored.dtype in FLOATS and stored.undo is None and not stored.shift and stored.quantised is None
    return plain and len(stored.shape) == 2 and stored.shape[1] % BLOCK == 0

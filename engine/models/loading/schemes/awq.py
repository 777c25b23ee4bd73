"""Checkpoints of AWQ: integers of four bits packed along the rows, eight to a word, in an order of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from engine.models.fields import Fields, show
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
    signed,
)
from engine.models.loading.schemes.gptq import CODES, SCALES, ZEROS

# A word holds first those of its eight numbers that have even places, then the others.
BITS = 4


class Awq:
    """See base.Scheme."""

    suffixes = (CODES, ZEROS, SCALES, ".weight")

    def __init__(self, config: Fields) -> None:
        self.config = config
        version = config.raw("version") or config.raw("checkpoint_format") or config.raw("format") or "gemm"
        if not isinstance(version, str) or version.lower() != "gemm":
            config.fail("version", f"({show(version)}) is not supported; gemm is")

    def matrix(self, module: str, parts: Mapping[str, StoredTensor]) -> Quantised | None:
        """See base.Scheme."""
        if CODES not in parts:
            return None
        bits = self.config.raw("bits") or self.config.raw("w_bit")
        size = self.config.raw("group_size") or self.config.raw("q_group_size")
        return matrix(module, parts, bits, size)


def matrix(module: str, parts: Mapping[str, StoredTensor], bits: Any, size: Any) -> Quantised:
    """bits, size: as config.json has them, None where it is silent. Raises Mismatch."""
    codes, zeros = need(module, parts, CODES, ("I32",)), need(module, parts, ZEROS, ("I32",))
    scales = need(module, parts, SCALES, FLOATS)
    if len(codes.shape) != 2 or len(scales.shape) != 2 or 0 in codes.shape + scales.shape:
        raise Mismatch(f"tensors {module}{CODES} and {SCALES} must be matrices")
    (columns, words), count = codes.shape, scales.shape[0]
    if bits not in (None, BITS):
        raise Mismatch(f"AWQ is read in {BITS} bits, and quantization_config says {show(bits)}")
    expect(module, SCALES, scales, (count, 8 * words))
    expect(module, ZEROS, zeros, (count, words))
    if size == -1:
        size = columns
    width = as_group(columns, count, size if isinstance(size, int) else None)
    return _Awq(f"int4 by {width}", (8 * words, columns), parts, BITS, width)


class _Awq(IntegerMatrix):
    """Columns by rows: a word holds numbers of eight rows."""

    def zeros(self, view: View) -> Tensor | None:
        """See IntegerMatrix."""
        return self._opened(view(self.parts[ZEROS]))

    def scales(self, view: View) -> Tensor:
        """See IntegerMatrix."""
        return view(self.parts[SCALES])

    def integers(self, view: View, begin: int, end: int) -> Integers:
        """See IntegerMatrix."""
        first, last = begin // 8, -(-end // 8)
        own = slice(begin - 8 * first, end - 8 * first)
        codes = self._opened(view(self.parts[CODES])[:, first:last])[own]
        zero = self._opened(view(self.parts[ZEROS])[:, first:last])[own]
        scale = view(self.parts[SCALES])[:, begin:end].T.float().contiguous()
        return Integers(codes.contiguous(), zero.int(), scale)

    @staticmethod
    def _opened(words: Tensor) -> Tensor:
        """int32 [columns, words] -> int8 [8 * words, columns]."""
        packed = words.contiguous().view(torch.uint8).view(len(words), -1, 4)
        nibbles = torch.stack((packed & 15, packed >> 4), 3).view(len(words), -1, 2, 4)
        return signed(nibbles.transpose(2, 3).reshape(len(words), -1), BITS).T

"""Checkpoints of GPTQ (AutoGPTQ, gptqmodel, AutoRound): integers packed along the columns, with a zero in each group.

The bits of a layer are what its tensors show, for config.json is often silent of a layer that differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
    unpack,
)
from engine.models.loading.schemes.names import aliases, compiled

CODES, ZEROS, SCALES, GROUPS = ".qweight", ".qzeros", ".scales", ".g_idx"
BITS = (2, 3, 4, 8)
# What is added to a stored zero.
OFFSETS = {"gptq": 1, "gptq_v2": 0}


class Gptq:
    """See base.Scheme."""

    suffixes = (CODES, ZEROS, SCALES, GROUPS, ".weight")

    def __init__(self, config: Fields) -> None:
        self.config = config
        form = config.raw("checkpoint_format") or ("marlin" if config.raw("is_marlin_format") else "gptq")
        if form not in OFFSETS:
            config.fail("checkpoint_format", f"({show(form)}) is not one of {', '.join(OFFSETS)}")
        self._offset = OFFSETS[form]
        self._dynamic = config.nested("dynamic")

    def matrix(self, module: str, parts: Mapping[str, StoredTensor]) -> Quantised | None:
        """See base.Scheme."""
        if CODES not in parts:
            return None
        bits, size = self.config.raw("bits"), self.config.raw("group_size")
        own = self._own(module)
        if own is False:
            raise Mismatch(f"has tensors of GPTQ, but dynamic in quantization_config leaves {module} out")
        if isinstance(own, dict):
            bits, size = own.get("bits", bits), own.get("group_size", size)
        elif module.endswith("lm_head"):
            bits, size = None, None
        return matrix(module, parts, bits, size, self._offset)

    def _own(self, module: str) -> Any:
        """What `dynamic` says of a module: the first expression that fits; None for nothing, False for none at all."""
        if self._dynamic is None:
            return None
        for pattern in self._dynamic.names_in_order():
            leaves_out = pattern.startswith("-:")
            text = pattern[2:] if pattern[:2] in ("-:", "+:") else pattern
            if any(compiled(text).match(name) for name in aliases(module)):
                return False if leaves_out else self._dynamic.raw(pattern)
        return None


def matrix(module: str, parts: Mapping[str, StoredTensor], bits: Any, size: Any, offset: int) -> Quantised:
    """bits, size: as config.json has them, None where it is silent. Raises Mismatch."""
    codes, zeros = need(module, parts, CODES, ("I32",)), need(module, parts, ZEROS, ("I32",))
    scales = need(module, parts, SCALES, FLOATS)
    if any(len(each.shape) != 2 or 0 in each.shape for each in (codes, zeros, scales)):
        raise Mismatch(f"tensors {module}{CODES}, {ZEROS} and {SCALES} must be matrices")
    rows, count = codes.shape[1], scales.shape[0]
    expect(module, SCALES, scales, (count, rows))
    own = zeros.shape[1] * 32 // rows
    if own not in BITS or zeros.shape != (count, rows * own // 32) or rows * own % 32:
        raise Mismatch(
            f"tensor {module}{ZEROS} has shape {list(zeros.shape)}, which {rows} rows in 2, 3, 4 or 8 bits are not"
        )
    if bits is not None and bits != own:
        raise Mismatch(f"has {own} bits, where quantization_config says {show(bits)}")
    if codes.shape[0] * 32 % own:
        raise Mismatch(f"tensor {module}{CODES} has shape {list(codes.shape)}, which is not of {own} bits")
    columns = codes.shape[0] * 32 // own
    groups = parts.get(GROUPS)
    if groups is not None:
        need(module, parts, GROUPS, ("I32", "I64"))
        expect(module, GROUPS, groups, (columns,))
    if size == -1:
        size = columns
    width = as_group(columns, count, size if isinstance(size, int) else None)
    return _Gptq(module, parts, (rows, columns), own, width, groups, offset)


class _Gptq(IntegerMatrix):
    """Columns by rows: a word holds numbers of one row."""

    def __init__(
        self,
        module: str,
        parts: Mapping[str, StoredTensor],
        shape: tuple[int, int],
        bits: int,
        size: int,
        groups: StoredTensor | None,
        offset: int,
    ) -> None:
        super().__init__(f"int{bits} by {size}", shape, parts, bits, size, groups)
        self._offset = offset

    def zeros(self, view: View) -> Tensor | None:
        """See IntegerMatrix."""
        return self._zero(view)

    def scales(self, view: View) -> Tensor:
        """See IntegerMatrix."""
        return view(self.parts[SCALES])

    def integers(self, view: View, begin: int, end: int) -> Integers:
        """See IntegerMatrix."""
        words = view(self.parts[CODES])[:, begin:end].T.contiguous()
        codes = signed(unpack(words, self.bits, self.shape[1]), self.bits)
        scale = view(self.parts[SCALES])[:, begin:end].T.float().contiguous()
        return Integers(codes, self._zero(view)[begin:end], scale)

    def _zero(self, view: View) -> Tensor:
        """int32 [rows, groups]."""
        found = unpack(view(self.parts[ZEROS]), self.bits, self.shape[0]).int()
        return (found + self._offset - (1 << (self.bits - 1))).T

"""Checkpoints of llm-compressor and others in the format compressed-tensors.

`config_groups` say what is quantised how, `targets` and `ignore` name the modules. The tensors that are there decide
the layout (one format's name had several); the config says the bits, and must not contradict them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
    expect,
    need,
    signed,
    unpack,
    word_count,
)
from engine.models.loading.schemes.floats import EXPONENTS, Float4Matrix, Float8Matrix
from engine.models.loading.schemes.names import aliases, means

NAME = "compressed-tensors"
PACKED, WEIGHT, SCALE, ZERO = ".weight_packed", ".weight", ".weight_scale", ".weight_zero_point"
GLOBAL, SHAPE, GROUPS = ".weight_global_scale", ".weight_shape", ".weight_g_idx"
# Transforms that are part of the weights already.
_FOLDED = ("weight_input", "weight_output")
MAX_BITS = 8
# Bytes that this version and later ones pack without gaps.
_DENSE = (0, 18)


@dataclass(frozen=True, slots=True)
class Group:
    """One of config_groups. weights: its quantisation of them, None where it has none. inputs: likewise."""

    targets: tuple[str, ...]
    weights: Fields | None
    inputs: Fields | None

    @property
    def bits(self) -> int:
        assert self.weights is not None
        return self.weights.integer("num_bits", 8, maximum=MAX_BITS)

    def float8_inputs(self) -> bool:
        """Whether it is for inputs of eight bits, with a scale for each row or for all."""
        given = self.inputs
        strategy = None if given is None else given.raw("strategy")
        return (
            given is not None
            and given.raw("num_bits") == 8
            and given.raw("type") == "float"
            and strategy in (None, "tensor", "token", "channel")
        )

    def size(self) -> int | None:
        """Columns that share a scale; None where all of a row or of the matrix do."""
        assert self.weights is not None
        size = self.weights.raw("group_size")
        return size if isinstance(size, int) and size > 0 else None

    def block(self) -> tuple[int, int] | None:
        """Rows and columns that share a scale."""
        assert self.weights is not None
        if self.weights.raw("strategy") != "block":
            return None
        shape = self.weights.integers("block_structure")
        if len(shape) != 2 or min(shape) < 1:
            self.weights.fail("block_structure", f"must be two integers, not {show(list(shape))}")
        return shape[0], shape[1]


class CompressedTensors:
    """See base.Scheme."""

    suffixes = (PACKED, WEIGHT, SCALE, ZERO, GLOBAL, SHAPE, GROUPS)

    def __init__(self, config: Fields) -> None:
        self._groups = [_group(each) for each in _objects(config, "config_groups")]
        self._ignored = config.words("ignore")
        self._version = _version(config.raw("version"))
        sparsity = config.nested("sparsity_config")
        if sparsity is not None and sparsity.raw("format") not in (None, "dense"):
            sparsity.fail("format", f"({show(sparsity.raw('format'))}) is not supported")
        if config.raw("format") in ("marlin-24", "sparse-24-bitmask", "sparse-bitmask"):
            config.fail("format", f"({show(config.raw('format'))}) is not supported")
        for transform in _objects(config, "transform_config.config_groups"):
            for where in transform.raw("apply") or ():
                place = where.get("location") if isinstance(where, dict) else None
                if place not in _FOLDED:
                    config.fail("transform_config", f"({show(place)}) is not supported: turned while it runs")

    def matrix(self, module: str, parts: Mapping[str, StoredTensor]) -> Quantised | None:
        """See base.Scheme."""
        if SCALE not in parts and PACKED not in parts:
            return None
        if any(means(each, module) for each in self._ignored):
            raise Mismatch(f"has scales, but ignore in quantization_config names {module}")
        group = self._group_of(module)
        if PACKED in parts and parts[PACKED].dtype == "I32":
            return self._packed(module, parts, group)
        if PACKED in parts:
            return _four_bits(module, parts)
        weight = need(module, parts, WEIGHT, ("I8", "F8_E4M3", *FLOATS))
        if weight.dtype in FLOATS:
            raise Mismatch(f"has scales beside numbers in {weight.dtype}: it is quantised only while it runs")
        if len(weight.shape) != 2:
            raise Mismatch(f"has shape {list(weight.shape)}, where a matrix is needed")
        if weight.dtype == "I8":
            return self._unpacked(module, parts, weight, group)
        return self._float8(module, parts, weight, group)

    def _group_of(self, module: str) -> Group | None:
        """That of the closest target: a name, else an expression, else a class."""
        groups = [group for group in self._groups if group.weights is not None]
        names = aliases(module)
        for kind in (False, True):
            for group in groups:
                patterns = [each for each in group.targets if each.startswith("re:") is kind]
                if any(means(each, name) for each in patterns for name in names):
                    return group
        classes = [group for group in groups if any("." not in each and ":" not in each for each in group.targets)]
        own = "Embedding" if module.endswith("embed_tokens") else "Linear"
        return next((group for group in classes if own in group.targets), None) or next(iter(classes), None)

    def _packed(self, module: str, parts: Mapping[str, StoredTensor], group: Group | None) -> Quantised:
        """Integers of a few bits in words, along the columns."""
        packed = need(module, parts, PACKED, ("I32",))
        scale = need(module, parts, SCALE, FLOATS)
        if group is None:
            raise Mismatch("is packed, but no config_groups in quantization_config name it")
        shape = read_integers(need(module, parts, SHAPE, ("I64", "I32")))
        if len(packed.shape) != 2 or len(shape) != 2 or min(shape) < 1 or shape[0] != packed.shape[0]:
            raise Mismatch(f"weight_shape {shape} does not fit weight_packed {list(packed.shape)}")
        (rows, columns), bits = shape, group.bits
        dense, gaps = word_count(columns, bits), word_count(columns, bits, padded=True)
        if packed.shape[1] not in (dense, gaps):
            raise Mismatch(
                f"num_bits in quantization_config is {bits}, which takes {dense} words a row, but weight_packed has "
                f"{packed.shape[1]}"
            )
        padded = packed.shape[1] == gaps != dense or (dense == gaps and self._version < _DENSE)
        size = _size_of(module, scale, (rows, columns), group)
        zero = parts.get(ZERO)
        if zero is not None:
            need(module, parts, ZERO, ("I32", "I8"))
            count = scale.shape[-1] if scale.shape else 1
            high = word_count(rows, bits, padded=padded)
            expect(module, ZERO, zero, (rows, count) if zero.dtype == "I8" else (high, count))
        return _Packed(module, parts, (rows, columns), bits, size, padded)

    def _unpacked(
        self, module: str, parts: Mapping[str, StoredTensor], weight: StoredTensor, group: Group | None
    ) -> Quantised:
        """Integers of which each is a byte, whatever their bits."""
        scale = need(module, parts, SCALE, FLOATS)
        rows, columns = weight.shape
        size = _size_of(module, scale, (rows, columns), group)
        zero = parts.get(ZERO)
        if zero is not None:
            need(module, parts, ZERO, ("I8",))
            expect(module, ZERO, zero, scale.shape)
        return _Bytes(module, parts, (rows, columns), group.bits if group is not None else 8, size)

    def _float8(
        self, module: str, parts: Mapping[str, StoredTensor], weight: StoredTensor, group: Group | None
    ) -> Quantised:
        scale = need(module, parts, SCALE, (*FLOATS, *EXPONENTS))
        rows, columns = weight.shape
        if scale.dtype in EXPONENTS:
            if len(scale.shape) != 2 or scale.shape[0] != rows:
                expect(module, SCALE, scale, (rows, -(-columns // 32)))
            wide = as_group(columns, scale.shape[1], (group and group.size()) or 32)
            return Float8Matrix("MXFP8", parts, weight, scale, (1, wide))
        if (block := group.block() if group is not None else None) is not None:
            expect(module, SCALE, scale, (-(-rows // block[0]), -(-columns // block[1])))
            return Float8Matrix("FP8 by block", parts, weight, scale, block)
        rounds = {"float8_inputs": group is not None and group.float8_inputs()}
        if scale.shape in ((), (1,), (1, 1)):
            return Float8Matrix("FP8 by tensor", parts, weight, scale, (rows, columns), **rounds)
        size = group.size() if group is not None else None
        if size is None:
            expect(module, SCALE, scale, (rows, 1), (rows,))
            return Float8Matrix("FP8 by row", parts, weight, scale, (1, columns), **rounds)
        expect(module, SCALE, scale, (rows, -(-columns // size)))
        return Float8Matrix(f"FP8 by {size}", parts, weight, scale, (1, size))


def _objects(config: Fields, name: str) -> list[Fields]:
    """The objects of an object of objects."""
    at: Fields | None = config
    for part in name.split("."):
        at = at.nested(part) if at is not None else None
    if at is None:
        return []
    found = [at.nested(key) for key in sorted(at.names())]
    return [each for each in found if each is not None]


def _group(group: Fields) -> Group:
    return Group(group.words("targets"), group.nested("weights"), group.nested("input_activations"))


def _version(given: Any) -> tuple[int, ...]:
    """(0, 17) of "0.17.1"; that of today where the file says nothing."""
    parts = given.split(".")[:2] if isinstance(given, str) else []
    return tuple(int(part) for part in parts) if len(parts) == 2 and all(p.isdecimal() for p in parts) else _DENSE


def _size_of(module: str, scale: StoredTensor, shape: tuple[int, int], group: Group | None) -> int:
    """Columns that share a scale. Raises Mismatch."""
    rows, columns = shape
    if scale.shape in ((), (1,), (1, 1)):
        return columns
    if scale.shape[0] != rows or len(scale.shape) > 2:
        expect(module, SCALE, scale, (rows, 1))
    count = scale.shape[1] if len(scale.shape) == 2 else 1
    size = group.size() if group is not None else None
    return as_group(columns, count, size or (columns if count == 1 else None))


def _four_bits(module: str, parts: Mapping[str, StoredTensor]) -> Quantised:
    """e2m1: NVFP4, where there is a global scale, or MXFP4."""
    packed = need(module, parts, PACKED, ("U8", "I8"))
    scale = need(module, parts, SCALE, ("F8_E4M3", *EXPONENTS))
    if len(packed.shape) != 2:
        raise Mismatch(f"tensor {module}{PACKED} has shape {list(packed.shape)}, where a matrix is needed")
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    group = 32 if scale.dtype in EXPONENTS else 16
    if columns % group:
        raise Mismatch(f"groups of {group} do not divide its {columns} columns")
    expect(module, SCALE, scale, (rows, columns // group))
    if group == 32:
        return Float4Matrix("MXFP4", parts, packed, scale, group)
    factor = need(module, parts, GLOBAL, FLOATS)
    expect(module, GLOBAL, factor, (), (1,))
    return Float4Matrix("NVFP4", parts, packed, scale, group, factor, divides=True)


class _Compressed(IntegerMatrix):
    """What the two layouts of integers share."""

    def __init__(
        self,
        module: str,
        parts: Mapping[str, StoredTensor],
        shape: tuple[int, int],
        bits: int,
        size: int,
        padded: bool = False,
    ) -> None:
        width = f" by {size}" if size < shape[1] else " by row"
        groups = parts.get(GROUPS)
        super().__init__(f"int{bits}{width}", shape, parts, bits, size, groups)
        self._padded = padded

    def zeros(self, view: View) -> Tensor | None:
        """See IntegerMatrix."""
        return self._zero(view) if ZERO in self.parts else None

    def scales(self, view: View) -> Tensor:
        """See IntegerMatrix."""
        return view(self.parts[SCALE])

    def integers(self, view: View, begin: int, end: int) -> Integers:
        """See IntegerMatrix."""
        rows = self.shape[0]
        scale = view(self.parts[SCALE]).float()
        scale = scale.view(1, 1).expand(rows, 1) if scale.numel() == 1 else scale.view(rows, -1)
        zero = None
        if ZERO in self.parts:
            zero = self._zero(view)
            zero = zero.view(1, 1).expand(rows, 1) if zero.numel() == 1 else zero
            zero = zero[begin:end]
        return Integers(self._codes(view, begin, end), zero, scale[begin:end])

    def _codes(self, view: View, begin: int, end: int) -> Tensor:
        raise NotImplementedError

    def _zero(self, view: View) -> Tensor:
        """int32 [rows, groups]."""
        stored = self.parts[ZERO]
        found = view(stored)
        if stored.dtype == "I8":
            return found.int().view(-1, found.shape[-1] if found.dim() == 2 else 1)
        along = unpack(found.T.contiguous(), self.bits, self.shape[0], padded=self._padded)
        return signed(along, self.bits).T.int()


class _Packed(_Compressed):
    """Words of several integers."""

    def _codes(self, view: View, begin: int, end: int) -> Tensor:
        found = unpack(view(self.parts[PACKED])[begin:end], self.bits, self.shape[1], padded=self._padded)
        return signed(found, self.bits)


class _Bytes(_Compressed):
    """An integer in each byte."""

    def _codes(self, view: View, begin: int, end: int) -> Tensor:
        found = view(self.parts[WEIGHT])[begin:end]
        most = 1 << (self.bits - 1)
        if self.bits < MAX_BITS and bool(((found < -most) | (found >= most)).any()):
            raise Mismatch(f"has numbers beyond {self.bits} bits, which num_bits in quantization_config says")
        return found


def make(config: Fields) -> CompressedTensors:
    """Raises StartupError."""
    return CompressedTensors(config)

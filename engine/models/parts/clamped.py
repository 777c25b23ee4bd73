"""Experts with biases and a clamped activation, their matrices in floats or kept in four bits (gpt-oss).

Run by the executor's thread.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from engine.models.parts.source import Source
from engine.models.spec import Clamp, Experts
from engine.ops.activation import clamped_and_mul
from engine.ops.device_coded import Codes, codes_of_mxfp4
from engine.ops.linear import Linear
from engine.ops.mxfp4 import BLOCK, Mxfp4Linear, mxfp4_linear

Matrix = Linear | Mxfp4Linear


def clamped_experts(spec: Experts, source: Source, prefix: str, hidden_size: int) -> list[Clamped]:
    """All experts of a layer."""
    assert spec.clamp is not None and spec.bias and len(spec.gate_up) == 1
    inner = spec.intermediate_size
    make = _four_bits if spec.mxfp4 else _floats
    ups = make(spec, source, prefix + spec.gate_up[0], 2 * inner, hidden_size)
    downs = make(spec, source, prefix + spec.down, hidden_size, inner)
    return [Clamped(up, down, spec.clamp) for up, down in zip(ups, downs, strict=True)]


def _floats(spec: Experts, source: Source, name: str, rows: int, columns: int) -> list[Matrix]:
    return [source.linear([name.format(each)], [rows], columns, bias=True) for each in spec.here]


def _four_bits(spec: Experts, source: Source, name: str, rows: int, columns: int) -> list[Matrix]:
    """The checkpoint has those of all experts in one tensor."""
    count, stem = len(spec.here), name.replace(".{}", "")
    blocks, scales = _stored(source, stem, count, rows, columns)
    biases = [source.tensor(f"{name.format(each)}.bias", (rows,)) for each in spec.here]
    layers = (mxfp4_linear(*each, source.dtype) for each in zip(blocks, scales, biases, strict=True))
    return [source.adapted(layer, name.format(each)) for each, layer in zip(spec.here, layers, strict=True)]


def mxfp4_stack(source: Source, name: str, count: int, rows: int, columns: int, order: Tensor | None) -> Codes:
    """The same as a GPU's kernels read them. order: of the rows of each."""
    stem = name.replace(".{}", "")
    return codes_of_mxfp4(*_stored(source, stem, count, rows, columns), order)


def _stored(source: Source, stem: str, count: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """uint8 blocks [count, rows, columns / 32, 16] and exponents [count, rows, columns / 32]."""
    blocks = source.raw(f"{stem}_blocks", (count, rows, columns // BLOCK, BLOCK // 2))
    return blocks, source.raw(f"{stem}_scales", (count, rows, columns // BLOCK))


class Clamped:
    """down(clamped(gate_up(x)))."""

    def __init__(self, gate_up: Callable[[Tensor], Tensor], down: Callable[[Tensor], Tensor], clamp: Clamp) -> None:
        self._gate_up, self._down, self._clamp = gate_up, down, clamp

    def __call__(self, x: Tensor) -> Tensor:
        """[N, hidden] -> [N, hidden]."""
        return self._down(clamped_and_mul(self._gate_up(x), self._clamp.limit, self._clamp.alpha))

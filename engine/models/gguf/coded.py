"""The blocks of GGUF's quantised types as codes with a scale for every few columns, as a GPU's kernels take them.

What a code stands for is said in ops/device_coded.py; times its scale, and with what is added, it is what dequantise.py
gives, but for the last place of types that have minima. Used while weights are loaded, on any thread. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.models.gguf import dequantise as blocks_of
from engine.models.gguf.dequantise import Bytes, Floats, fifth_bits, half, nibbles

# Codes uint8 [n, elements], scales float32 [n, scales], what is added the same or None.
Codes = tuple[Bytes, Floats, Floats | None]


def coded(kind: str, blocks: Bytes) -> Codes:
    """kind: one of CODED. blocks uint8 [n, size]. Raises ValueError for a scale that is no finite number."""
    codes, scale, low = _TYPES[kind][2](blocks)
    return np.ascontiguousarray(codes).view(np.uint8).reshape(len(blocks), -1), scale, low


Parts = tuple[NDArray[Any], Floats, Floats | None]


def _q4_0(blocks: Bytes) -> Parts:
    return nibbles(blocks[:, 2:]), half(blocks, 0), None


def _q4_1(blocks: Bytes) -> Parts:
    return nibbles(blocks[:, 4:]), half(blocks, 0), half(blocks, 2)


def _q5_0(blocks: Bytes) -> Parts:
    codes = nibbles(blocks[:, 6:]) | fifth_bits(blocks, 2)
    return codes.view(np.int8) - np.int8(16), half(blocks, 0), None


def _q5_1(blocks: Bytes) -> Parts:
    return nibbles(blocks[:, 8:]) | fifth_bits(blocks, 4), half(blocks, 0), half(blocks, 2)


def _q8_0(blocks: Bytes) -> Parts:
    return blocks[:, 2:], half(blocks, 0), None


def _q2_k(blocks: Bytes) -> Parts:
    codes, scale, low = blocks_of.q2_k_parts(blocks)
    return codes, scale, -low


def _q3_k(blocks: Bytes) -> Parts:
    codes, scale = blocks_of.q3_k_parts(blocks)
    return codes + np.int8(8), scale, None


def _q4_k(blocks: Bytes) -> Parts:
    codes, scale, low = blocks_of.k_parts(blocks, five=False)
    return codes, scale, -low


def _q5_k(blocks: Bytes) -> Parts:
    codes, scale, low = blocks_of.k_parts(blocks, five=True)
    return codes, scale, -low


def _q6_k(blocks: Bytes) -> Parts:
    return *blocks_of.q6_k_parts(blocks), None


def _iq4_nl(blocks: Bytes) -> Parts:
    return blocks_of.IQ4.astype(np.int8)[nibbles(blocks[:, 2:])], half(blocks, 0), None


def _iq4_xs(blocks: Bytes) -> Parts:
    index, scale = blocks_of.iq4_xs_parts(blocks)
    return blocks_of.IQ4.astype(np.int8)[index], scale, None


def _mxfp4(blocks: Bytes) -> Parts:
    # The scale there is of twice the numbers.
    scale = 2 * blocks_of.mxfp4_scales(blocks)
    if not np.isfinite(scale).all():
        raise ValueError("a block has a scale that is not a finite number")
    return nibbles(blocks[:, 1:]), scale, None


def _tq2_0(blocks: Bytes) -> Parts:
    return blocks_of.two_bits(blocks[:, :64]) + np.uint8(7), half(blocks, 64), None


# By type: the form of its codes, columns of a scale, and what reads its blocks.
_TYPES: dict[str, tuple[str, int, Callable[[Bytes], Parts]]] = {
    "Q4_0": ("int4", 32, _q4_0),
    "Q4_1": ("int4 and low", 32, _q4_1),
    "Q5_0": ("int8", 32, _q5_0),
    "Q5_1": ("int8 and low", 32, _q5_1),
    "Q8_0": ("int8", 32, _q8_0),
    "Q2_K": ("int4 and low", 16, _q2_k),
    "Q3_K": ("int4", 16, _q3_k),
    "Q4_K": ("int4 and low", 32, _q4_k),
    "Q5_K": ("int8 and low", 32, _q5_k),
    "Q6_K": ("int8", 16, _q6_k),
    "IQ4_NL": ("int8", 32, _iq4_nl),
    "IQ4_XS": ("int8", 32, _iq4_xs),
    "MXFP4": ("e2m1", 32, _mxfp4),
    "TQ2_0": ("int4", 256, _tq2_0),
}
# The form of a type's codes, and columns of a scale.
CODED = {name: (form, group) for name, (form, group, _) in _TYPES.items()}

"""Blocks of GGUF's quantised types as integers and what turns them into weights: q * scale (+ low), each rounded once.

Of types whose every 32 weights share a scale; the result is what dequantise.py gives, bit for bit. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from engine.models.gguf.dequantise import Bytes, Floats, fifth_bits, half, halves, nibbles, six_bit_scales

# Weights that share a scale.
BLOCK = 32


@dataclass(frozen=True, slots=True)
class Form:
    """bits: of a code; 4 without a sign, from which 8 is taken where there is no low, or 8 with a sign. low: a number
    is added to each product."""

    bits: int
    low: bool


FORMS = {
    "Q4_0": Form(4, False),
    "Q4_1": Form(4, True),
    "Q5_0": Form(8, False),
    "Q5_1": Form(8, True),
    "Q8_0": Form(8, False),
    "Q4_K": Form(4, True),
    "Q5_K": Form(8, True),
}

Parts = tuple[Bytes, Floats, Floats | None]


def split(kind: str, blocks: Bytes) -> Parts:
    """kind: one of FORMS. uint8 [n, size] -> codes uint8 [n, elements], scale and low float32 [n, elements / BLOCK].

    Raises ValueError for a scale that is no finite number.
    """
    return _FUNCTIONS[kind](blocks)


def _q4_0(blocks: Bytes) -> Parts:
    return nibbles(blocks[:, 2:]), half(blocks, 0), None


def _q4_1(blocks: Bytes) -> Parts:
    return nibbles(blocks[:, 4:]), half(blocks, 0), half(blocks, 2)


def _q5_0(blocks: Bytes) -> Parts:
    return (nibbles(blocks[:, 6:]) | fifth_bits(blocks, 2)) - np.uint8(16), half(blocks, 0), None


def _q5_1(blocks: Bytes) -> Parts:
    return nibbles(blocks[:, 8:]) | fifth_bits(blocks, 4), half(blocks, 0), half(blocks, 2)


def _q8_0(blocks: Bytes) -> Parts:
    return blocks[:, 2:], half(blocks, 0), None


def _q4_k(blocks: Bytes) -> Parts:
    return halves(blocks[:, 16:]).reshape(-1, 256), *_k_scales(blocks)


def _q5_k(blocks: Bytes) -> Parts:
    bits = (blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8).reshape(1, 8, 1)) & np.uint8(1)
    return (halves(blocks[:, 48:]) | (bits << np.uint8(4))).reshape(-1, 256), *_k_scales(blocks)


def _k_scales(blocks: Bytes) -> tuple[Floats, Floats]:
    scale, low = six_bit_scales(blocks[:, 4:16])
    return half(blocks, 0) * scale.astype(np.float32), -(half(blocks, 2) * low.astype(np.float32))


_FUNCTIONS: dict[str, Callable[[Bytes], Parts]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
}

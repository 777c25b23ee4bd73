"""From the blocks of GGUF's quantised types to float32, as llama.cpp's reference functions compute it, bit for bit.

Each function takes blocks uint8 [n, size] and fills out float32 [n, elements]; all operations are over whole arrays and
in the reference's order. Used while weights are loaded, on any thread. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

# The values of 4 bits in the IQ4 types, and of MXFP4 (twice those of e2m1: the scale is halved for it).
IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.float32)
_E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], dtype=np.float32)


def dequantise(kind: str, blocks: Bytes, out: Floats) -> None:
    """kind: one of DEQUANTISED. Raises ValueError for a scale that is no finite number."""
    # The largest scales of MXFP4 give infinities in the reference, too.
    with np.errstate(over="ignore"):
        _FUNCTIONS[kind](blocks, out)


def half(blocks: Bytes, at: int) -> Floats:
    """float32 [n, 1] of the float16 at byte `at`."""
    scales = np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)
    if not np.isfinite(scales).all():
        raise ValueError(f"block {int(np.isfinite(scales).argmin())} has a scale that is not a finite number")
    return scales


def _put_nibbles(packed: Bytes, out: NDArray[Any]) -> None:
    """Byte j of k holds element j in its low half and j + k in its high one."""
    count = packed.shape[-1]
    np.bitwise_and(packed, 15, out=out[..., :count], casting="unsafe")
    np.right_shift(packed, 4, out=out[..., count:], casting="unsafe")


def nibbles(packed: Bytes) -> Bytes:
    """uint8 [n, k] -> [n, 2 k], in the order of elements."""
    values = np.empty((len(packed), 2 * packed.shape[1]), dtype=np.uint8)
    _put_nibbles(packed, values)
    return values


def fifth_bits(blocks: Bytes, at: int) -> Bytes:
    """uint8 [n, 32]: 16 where bit j of the 32 at byte `at` is set."""
    bits = np.unpackbits(np.ascontiguousarray(blocks[:, at : at + 4]), axis=1, bitorder="little")
    return bits << np.uint8(4)


def _q4_0(blocks: Bytes, out: Floats) -> None:
    _put_nibbles(blocks[:, 2:], out)
    out -= 8
    out *= half(blocks, 0)


def _q4_1(blocks: Bytes, out: Floats) -> None:
    _put_nibbles(blocks[:, 4:], out)
    out *= half(blocks, 0)
    out += half(blocks, 2)


def _q5_0(blocks: Bytes, out: Floats) -> None:
    _put_nibbles(blocks[:, 6:], out)
    out += fifth_bits(blocks, 2)
    out -= 16
    out *= half(blocks, 0)


def _q5_1(blocks: Bytes, out: Floats) -> None:
    _put_nibbles(blocks[:, 8:], out)
    out += fifth_bits(blocks, 4)
    out *= half(blocks, 0)
    out += half(blocks, 2)


def _q8_0(blocks: Bytes, out: Floats) -> None:
    np.multiply(blocks[:, 2:].view(np.int8), half(blocks, 0), out=out)


def two_bits(packed: Bytes) -> Bytes:
    """[n, 64] -> [n, 16, 16]: of each 32 bytes first all lowest pairs of bits, then the next, then the other 32."""
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8).reshape(1, 1, 4, 1)
    return ((packed.reshape(-1, 2, 1, 32) >> shifts) & np.uint8(3)).reshape(-1, 16, 16)


def q2_k_parts(blocks: Bytes) -> tuple[Bytes, Floats, Floats]:
    """[n, 16, 16] numbers, [n, 16] scales and minima."""
    scales = blocks[:, :16]
    scale = half(blocks, 80) * (scales & 15).astype(np.float32)
    low = half(blocks, 82) * (scales >> 4).astype(np.float32)
    return two_bits(blocks[:, 16:80]), scale, low


def _q2_k(blocks: Bytes, out: Floats) -> None:
    values, scale, low = q2_k_parts(blocks)
    result = out.reshape(-1, 16, 16)
    np.multiply(values, scale[:, :, None], out=result)
    result -= low[:, :, None]


def q3_k_parts(blocks: Bytes) -> tuple[NDArray[np.int8], Floats]:
    """[n, 16, 16] numbers and [n, 16] scales."""
    packed = blocks[:, 96:108]
    low = np.concatenate((packed[:, :8] & 15, packed[:, :8] >> 4), axis=1)
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8).reshape(1, 4, 1)
    high = ((packed[:, None, 8:] >> shifts) & np.uint8(3)).reshape(-1, 16)
    scale = (low | (high << np.uint8(4))).astype(np.int8) - np.int8(32)
    bits = (blocks[:, None, :32] >> np.arange(8, dtype=np.uint8).reshape(1, 8, 1)) & np.uint8(1)
    values = two_bits(blocks[:, 32:96]).astype(np.int8) - ((bits ^ 1) << np.uint8(2)).astype(np.int8).reshape(
        -1, 16, 16
    )
    return values, half(blocks, 108) * scale.astype(np.float32)


def _q3_k(blocks: Bytes, out: Floats) -> None:
    values, scales = q3_k_parts(blocks)
    np.multiply(values, scales[:, :, None], out=out.reshape(-1, 16, 16))


def six_bit_scales(packed: Bytes) -> tuple[Bytes, Bytes]:
    """[n, 12] -> the scales and the minima of 8 sub-blocks, [n, 8] each."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scale = np.concatenate((first & 63, (third & 15) | ((first >> 2) & 0x30)), axis=1)
    low = np.concatenate((second & 63, (third >> 4) | ((second >> 2) & 0x30)), axis=1)
    return scale, low


def halves(packed: Bytes) -> Bytes:
    """[n, 128] -> [n, 8, 32]: of each 32 bytes the low halves, then the high ones."""
    values = np.empty((len(packed), 4, 64), dtype=np.uint8)
    _put_nibbles(packed.reshape(-1, 4, 32), values)
    return values.reshape(-1, 8, 32)


def k_parts(blocks: Bytes, *, five: bool) -> tuple[Bytes, Floats, Floats]:
    """Of Q5_K, or of Q4_K: [n, 8, 32] numbers, [n, 8] scales and minima."""
    scale, low = six_bit_scales(blocks[:, 4:16])
    values = halves(blocks[:, 48 if five else 16 :])
    if five:
        bits = (blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8).reshape(1, 8, 1)) & np.uint8(1)
        values |= bits << np.uint8(4)
    return values, half(blocks, 0) * scale.astype(np.float32), half(blocks, 2) * low.astype(np.float32)


def _scaled_with_minimum(values: Bytes, scale: Floats, low: Floats, out: Floats) -> None:
    result = out.reshape(-1, 8, 32)
    np.multiply(values, scale[:, :, None], out=result)
    result -= low[:, :, None]


def _q4_k(blocks: Bytes, out: Floats) -> None:
    _scaled_with_minimum(*k_parts(blocks, five=False), out)


def _q5_k(blocks: Bytes, out: Floats) -> None:
    _scaled_with_minimum(*k_parts(blocks, five=True), out)


def q6_k_parts(blocks: Bytes) -> tuple[NDArray[np.int8], Floats]:
    """[n, 16, 16] numbers and [n, 16] scales."""
    low = np.empty((len(blocks), 2, 128), dtype=np.uint8)
    _put_nibbles(blocks[:, :128].reshape(-1, 2, 64), low)
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8).reshape(1, 1, 4, 1)
    high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & np.uint8(3)
    values = (low | (high.reshape(-1, 2, 128) << np.uint8(4))).astype(np.int8) - np.int8(32)
    return values.reshape(-1, 16, 16), half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)


def _q6_k(blocks: Bytes, out: Floats) -> None:
    values, scale = q6_k_parts(blocks)
    np.multiply(values, scale[:, :, None], out=out.reshape(-1, 16, 16))


def _iq4_nl(blocks: Bytes, out: Floats) -> None:
    np.multiply(IQ4[nibbles(blocks[:, 2:])], half(blocks, 0), out=out)


def iq4_xs_parts(blocks: Bytes) -> tuple[Bytes, Floats]:
    """[n, 8, 32] places in the table, and [n, 8] scales."""
    low = np.empty((len(blocks), 4, 2), dtype=np.uint8)
    _put_nibbles(blocks[:, 4:8].reshape(-1, 4, 1), low)
    high = np.ascontiguousarray(blocks[:, 2:4]).view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16)
    scale = (low.reshape(-1, 8) | ((high & 3) << 4).astype(np.uint8)).astype(np.int8) - np.int8(32)
    index = np.empty((len(blocks), 8, 32), dtype=np.uint8)
    _put_nibbles(blocks[:, 8:].reshape(-1, 8, 16), index)
    return index, half(blocks, 0) * scale.astype(np.float32)


def _iq4_xs(blocks: Bytes, out: Floats) -> None:
    index, scales = iq4_xs_parts(blocks)
    np.multiply(IQ4[index], scales[:, :, None], out=out.reshape(-1, 8, 32))


def mxfp4_scales(blocks: Bytes) -> Floats:
    """[n, 1]: half of 2 ** (e - 127), which is below the normal numbers for e of 0 and 1. 255 is no number, by OCP."""
    if (blocks[:, 0] == 255).any():
        raise ValueError(f"block {int((blocks[:, 0] == 255).argmax())} has a scale that is not a finite number")
    exponent = blocks[:, :1].astype(np.uint32)
    tiny = np.uint32(0x00200000) << exponent.clip(max=1)
    return np.where(exponent < 2, tiny, (exponent.clip(min=2) - np.uint32(1)) << np.uint32(23)).view(np.float32)


def _mxfp4(blocks: Bytes, out: Floats) -> None:
    np.multiply(_E2M1[nibbles(blocks[:, 1:])], mxfp4_scales(blocks), out=out)


def _tq2_0(blocks: Bytes, out: Floats) -> None:
    values = two_bits(blocks[:, :64]).astype(np.int8) - np.int8(1)
    np.multiply(values.reshape(-1, 256), half(blocks, 64), out=out)


_FUNCTIONS: dict[str, Callable[[Bytes, Floats], None]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
    "TQ2_0": _tq2_0,
}
DEQUANTISED = tuple(_FUNCTIONS)

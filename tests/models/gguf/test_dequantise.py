"""Each type, bit for bit, against the dequantiser of the `gguf` package on random blocks."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from engine.models.gguf.dequantise import DEQUANTISED, dequantise
from engine.models.gguf.types import BY_NAME, TYPES


def random_blocks(kind: str, count: int, seed: int = 0) -> np.ndarray:
    """Random bytes, every scale among them a number: half of random bytes are no finite float16 now and then."""
    block = BY_NAME[kind]
    blocks = np.random.default_rng(seed).integers(0, 256, (count, block.size), dtype=np.uint8)
    for at in {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "TQ2_0": (64,), "MXFP4": ()}.get(kind, (0, 2)):
        half = blocks[:, at : at + 2].copy().view(np.float16)
        half[~np.isfinite(half)] = 0.5
        blocks[:, at : at + 2] = half.view(np.uint8)
    return blocks


# Bytes of a block that hold float16 scales, where those are not the first two.
SCALES = {
    **{"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,)},
    **{"Q6_K": (208,), "TQ2_0": (64,), "MXFP4": ()},
}


def weight_blocks(kind: str, count: int, seed: int = 0) -> np.ndarray:
    """The same with scales of weights, not of anything."""
    blocks = random_blocks(kind, count, seed)
    largest = {
        "Q8_0": 127,
        "Q6_K": 1000,
        "Q3_K": 64,
        "IQ4_XS": 2000,
        "Q4_K": 400,
        "Q5_K": 800,
        "Q2_K": 24,
        "IQ4_NL": 90,
    }
    for at in SCALES.get(kind, (0,)):
        scales = np.random.default_rng(seed + at).normal(0, 0.1 / largest.get(kind, 12), count).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    if kind == "MXFP4":
        blocks[:, 0] = np.random.default_rng(seed).integers(120, 124, count)
    return blocks


@pytest.mark.parametrize("kind", DEQUANTISED)
def test_bits_are_those_of_the_reference(kind: str) -> None:
    blocks = random_blocks(kind, 512)
    out = np.full((512, BY_NAME[kind].elements), np.nan, dtype=np.float32)
    if kind == "MXFP4":
        blocks[:, 0] %= 240  # the test after this one has the largest
    dequantise(kind, blocks, out)
    expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind]).reshape(out.shape)
    assert np.isfinite(expected).all()
    np.testing.assert_array_equal(out.view(np.uint32), expected.view(np.uint32))


def test_every_exponent_of_mxfp4() -> None:
    """But 255, which is no number by OCP; the reference takes it for one more power of two."""
    blocks = np.tile(np.arange(17, dtype=np.uint8) * 15, (255, 1))
    blocks[:, 0] = np.arange(255)
    out = np.empty((255, 32), dtype=np.float32)
    dequantise("MXFP4", blocks, out)
    with np.errstate(over="ignore"):
        expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.MXFP4)
    np.testing.assert_array_equal(out.view(np.uint32), expected.view(np.uint32))


def test_blocks_are_as_large_as_there() -> None:
    sizes = {int(kind): (kind.name, *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType}
    for number, block in TYPES.items():
        assert (block.name, block.elements, block.size) == sizes[number]


def test_a_scale_that_is_no_number() -> None:
    for kind in DEQUANTISED:
        blocks = random_blocks(kind, 8)
        at = {"Q2_K": 82, "Q3_K": 108, "Q6_K": 208, "TQ2_0": 64}.get(kind, 0)
        if kind == "MXFP4":
            blocks[:, 0] = 254
            blocks[5, 0] = 255
        else:
            blocks[5, at : at + 2] = 0x7F
        with pytest.raises(ValueError, match="block 5 has a scale"):
            dequantise(kind, blocks, np.empty((8, BY_NAME[kind].elements), dtype=np.float32))

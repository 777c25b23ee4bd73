"""Layers of packed integers: those of the float32 weights that they stand for, and the same bits in any batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.models.gguf.dequantise import DEQUANTISED, dequantise
from engine.models.gguf.types import BY_NAME
from engine.ops import native
from engine.ops.linear import Linear
from engine.ops.packed import PACKED_KINDS, MixedLinear, PackedLinear, can_stay_packed
from tests.models.gguf.test_dequantise import weight_blocks

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not can_stay_packed(torch.float32, CPU), reason="no native kernels")


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)


def packed(
    kind: str, rows: int, columns: int, dtype: torch.dtype = torch.float32, bias: Tensor | None = None
) -> tuple[PackedLinear, Tensor]:
    """A layer of random blocks, packed in two pieces, and its weight in float32."""
    block = BY_NAME[kind]
    blocks = weight_blocks(kind, rows * columns // block.elements)
    weight = np.empty((len(blocks), block.elements), dtype=np.float32)
    dequantise(kind, blocks, weight)
    return pack(kind, blocks.reshape(rows, -1), columns, dtype, bias), torch.from_numpy(weight.reshape(rows, columns))


def pack(
    kind: str, blocks: np.ndarray, columns: int, dtype: torch.dtype = torch.float32, bias: Tensor | None = None
) -> PackedLinear:
    layer = PackedLinear(kind, len(blocks), columns, dtype, bias)
    cut = PackedLinear.piece_rows(len(blocks) // 2)
    for first in (0, cut):
        piece = blocks[first : first + cut] if first == 0 else blocks[first:]
        addresses = blocks.ctypes.data + blocks.shape[1] * np.arange(first, first + len(piece))
        assert layer.pack(first, torch.from_numpy(addresses)) is None
    return layer


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_every_type_that_is_read() -> None:
    assert set(PACKED_KINDS) == set(DEQUANTISED)
    library = native.library()
    assert library is not None
    for kind, (number, shared) in PACKED_KINDS.items():
        block = BY_NAME[kind]
        assert shared == block.elements
        size = library.hold.ol_packed_blocks(number, 1024, 1024) / (1024 * 1024 // block.elements)
        assert block.size <= size <= 1.04 * block.size, kind


@pytest.mark.parametrize("kind", PACKED_KINDS)
@pytest.mark.parametrize(("rows", "columns"), [(77, 512), (64, 768)])
def test_products_of_the_plain_weights(kind: str, rows: int, columns: int) -> None:
    bias = torch.linspace(-1, 1, rows) if rows == 77 else None
    layer, weight = packed(kind, rows, columns, bias=bias)
    x = torch.randn(215, columns, generator=torch.Generator().manual_seed(0))
    found = layer(x)
    assert relative_error(found, torch.nn.functional.linear(x, weight, bias)) < 3e-5
    for count in (1, 2, 5, 6, 7, 13, 193):
        assert torch.equal(layer(x[:count]), found[:count])
    assert torch.equal(layer(x[3:4]), found[3:4])
    ids = torch.tensor([0, rows - 1, 17, 17])
    assert torch.equal(layer.rows(ids), weight[ids]) and torch.equal(layer.rows(ids.int()), weight[ids])


# Codes of a byte's eight bits, and those that stand for numbers of a table, have products of 16 bits alone.
SIXTEEN = {"Q8_0", "IQ4_NL", "IQ4_XS", "MXFP4"}


@pytest.mark.parametrize("kind", PACKED_KINDS)
def test_inputs_of_eight_bits(kind: str) -> None:
    """Exactly the products of what inputs are rounded to, in any batch."""
    layer, weight = packed(kind, 77, 512, bias=torch.linspace(-1, 1, 77))
    x = torch.randn(215, 512, generator=torch.Generator().manual_seed(0))
    x[1] = 0
    x[7, 400:] *= 1e5
    before = layer(x)
    layer.take_eight_bits()
    found = layer(x)
    assert layer.input_bits == (16 if kind in SIXTEEN else 8)
    if kind in SIXTEEN:
        assert torch.equal(found, before)
        return
    blocks = x.reshape(215, -1, 32)
    scale = blocks.abs().amax(2, keepdim=True) / 127
    rounded = ((blocks / scale.clamp_min(1e-30)).round() * scale).reshape(215, 512)
    expected = torch.nn.functional.linear(rounded, weight, torch.linspace(-1, 1, 77))
    # A number in the middle of two may be rounded either way.
    assert relative_error(found, expected) < 1e-4
    assert 1e-4 < relative_error(found[8:], before[8:]) < 1e-2
    for count in (1, 2, 4, 5, 6, 7, 8, 9, 13, 193):
        assert torch.equal(layer(x[:count]), found[:count])
    assert torch.equal(layer(x[7:8]), found[7:8])
    x[3, 5] = float("nan")
    assert torch.isnan(layer(x)[3]).all() and torch.equal(layer(x)[4:], found[4:])


@pytest.mark.parametrize("columns", [32, 96, 288])
def test_short_rows(columns: int) -> None:
    layer, weight = packed("Q4_1", 40, columns)
    x = torch.randn(9, columns + 8)[:, :columns]  # strided
    found = layer(x)
    # Each input is off by half a step of its block at most; so is each output by no more than that with its weights.
    blocks = x.reshape(9, -1, 32).double()
    most = blocks.abs().amax(2, keepdim=True) / 32767 / 2
    bound = (most.expand_as(blocks).reshape(9, columns) @ weight.abs().double().T) + 1e-6 * (x.abs() @ weight.abs().T)
    assert bool(((found - x.double() @ weight.double().T).abs() <= bound).all())
    assert torch.equal(layer(x[:1]), found[:1])
    # What is said of a layer is said of wide ones; in so few numbers chance counts.
    assert columns < 288 or relative_error(found, x @ weight.T) < 3e-5


def test_inputs_in_bfloat16() -> None:
    layer, weight = packed("Q8_0", 48, 256, torch.bfloat16)
    x = torch.randn(7, 256).bfloat16()
    assert layer(x).dtype == torch.bfloat16
    assert relative_error(layer(x).float(), x.float() @ weight.T) < 3e-3
    assert torch.equal(layer(x)[:1], layer(x[:1]))
    assert layer.rows(torch.tensor([5])).dtype == torch.bfloat16


def test_inputs_of_any_size() -> None:
    """Zeros give the bias, blocks of very different sizes do not disturb each other, and what is no number stays so."""
    layer, weight = packed("Q6_K", 32, 512)
    x = torch.randn(6, 512)
    x[1] = 0
    x[2, :256] *= 1e6
    x[2, 256:] *= 1e-6
    x[3] *= 1e-36
    x[4, 9] = float("nan")
    x[5, 300] = float("inf")
    found = layer(x)
    assert not found[1].any() and torch.isnan(found[4:]).all()
    assert relative_error(found[2], weight @ x[2]) < 3e-5
    assert found[3].abs().max() < 1e-30
    assert torch.equal(layer(x[2:3]), found[2:3])


def test_threads_change_nothing() -> None:
    layer, _ = packed("Q4_K", 1024, 512)
    x = torch.randn(3, 512)
    alone = layer(x), layer(x[:1])
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(layer(x), alone[0]) and torch.equal(layer(x[:1]), alone[1])
    finally:
        torch.set_num_threads(before)


def test_layers_of_several_types() -> None:
    one, other = packed("Q4_K", 48, 256)[0], packed("Q6_K", 24, 256)[0]
    plain = Linear(torch.randn(20, 256))
    plain.prepare(kind="native")
    mixed = MixedLinear([one, plain, other])
    assert mixed.out_features == 92 and mixed.kind == "native"
    x = torch.randn(5, 256)
    assert torch.equal(mixed(x), torch.cat([one(x), plain(x), other(x)], 1))
    ids = torch.tensor([91, 0, 50, 47, 68, 48])
    parts = [one.rows(torch.arange(48)), plain.rows(torch.arange(20)), other.rows(torch.arange(24))]
    assert torch.equal(mixed.rows(ids), torch.cat(parts)[ids])


@pytest.mark.parametrize(("kind", "at"), [("Q4_0", 0), ("Q5_1", 2), ("Q6_K", 208), ("Q4_K", 2)])
def test_a_scale_that_is_no_finite_number(kind: str, at: int) -> None:
    block = BY_NAME[kind]
    blocks = np.zeros((40, 512 // block.elements * block.size), dtype=np.uint8)
    place = blocks.shape[1] - block.size + at
    blocks[33, place : place + 2] = np.array([np.nan], np.float16).view(np.uint8)
    layer = PackedLinear(kind, 40, 512, torch.float32)
    addresses = blocks.ctypes.data + blocks.shape[1] * np.arange(40)
    assert layer.pack(0, torch.from_numpy(addresses)) == 33

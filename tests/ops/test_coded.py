"""Layers of small integers: bit for bit the layers of the float32 weights that the integers stand for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.models.gguf.codes import FORMS, split
from engine.models.gguf.dequantise import dequantise
from engine.models.gguf.types import BY_NAME
from engine.ops import native
from engine.ops.coded import CODE_BLOCK, CodedLinear, can_keep_codes
from engine.ops.linear import Linear
from tests.models.gguf.test_dequantise import random_blocks

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not can_keep_codes(torch.float32, CPU), reason="no native kernels")


def pair(
    kind: str, rows: int, columns: int, dtype: torch.dtype = torch.float32, bias: bool = False
) -> tuple[Linear, Linear]:
    """A coded layer of random blocks, in two pieces, and the plain one of the same numbers."""
    block = BY_NAME[kind]
    blocks = random_blocks(kind, rows * columns // block.elements)
    # Scales of weights, not of anything.
    for at in {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2)}.get(kind, (0,)):
        scales = np.random.default_rng(at).normal(0, 0.01, len(blocks)).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    weight = np.empty((len(blocks), block.elements), dtype=np.float32)
    dequantise(kind, blocks, weight)
    codes, scale, low = split(kind, blocks)
    parts = [codes.reshape(rows, columns)]
    parts += [each.reshape(rows, -1) for each in (scale, low) if each is not None]
    tensors = [torch.from_numpy(np.ascontiguousarray(part)) for part in parts]
    cut = CodedLinear.piece_rows(rows // 2)
    added = torch.linspace(-1, 1, rows) if bias else None
    pieces = (
        (a, b, tensors[0][a:b], tensors[1][a:b], tensors[2][a:b] if low is not None else None)
        for a, b in ((0, cut), (cut, rows))
    )
    form = FORMS[kind]
    coded = CodedLinear(form.bits, form.low, rows, columns, dtype, pieces, added)
    plain = Linear(torch.from_numpy(weight.reshape(rows, columns)), added)
    plain.prepare(kind="native")
    return coded, plain


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize(("rows", "columns"), [(77, 512), (64, 768)])
def test_bits_of_the_plain_layer(kind: str, rows: int, columns: int) -> None:
    coded, plain = pair(kind, rows, columns, bias=rows == 77)
    x = torch.randn(250, columns, generator=torch.Generator().manual_seed(0))
    expected = plain(x)
    assert torch.equal(coded(x), expected)
    for count in (1, 2, 5, 6, 7, 13, 193):
        assert torch.equal(coded(x[:count]), expected[:count])
    assert torch.equal(coded(x[3:4]), expected[3:4])
    ids = torch.tensor([0, rows - 1, 17, 17])
    assert torch.equal(coded.rows(ids), plain.rows(ids)) and torch.equal(coded.rows(ids.int()), plain.rows(ids))


@pytest.mark.parametrize("columns", [32, 96, 288])
def test_short_rows(columns: int) -> None:
    coded, plain = pair("Q4_1", 40, columns)
    x = torch.randn(9, columns + 8)[:, :columns]  # strided
    assert torch.equal(coded(x), plain(x)) and torch.equal(coded(x[:1]), plain(x[:1]))


def test_inputs_in_bfloat16() -> None:
    """Widened, multiplied as float32, rounded once."""
    coded, plain = pair("Q8_0", 48, 256, torch.bfloat16)
    x = torch.randn(7, 256).bfloat16()
    assert torch.equal(coded(x), plain(x.float()).bfloat16())
    assert torch.equal(coded(x[:1]), plain(x[:1].float()).bfloat16())
    assert coded.rows(torch.tensor([5])).dtype == torch.bfloat16


def test_threads_change_nothing() -> None:
    coded, _ = pair("Q4_0", 1024, 512)
    x = torch.randn(3, 512)
    alone = coded(x)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(coded(x), alone)
    finally:
        torch.set_num_threads(before)


def test_bytes_are_few() -> None:
    library = native.library()
    assert library is not None
    for (bits, low), expected in {(4, 0): 5, (4, 1): 6, (8, 0): 9, (8, 1): 10}.items():
        assert library.hold.ol_codes_size(bits, low, 1024, 1024) * 32 == expected * 1024 * 1024
    assert CODE_BLOCK == 32

"""Layers of small codes: bit for bit the layers of the float32 weights that the codes stand for."""

from __future__ import annotations

import pytest
import torch

from engine.ops import native
from engine.ops.coded import CODE_BLOCK, CODE_FORMS, CodedLinear, can_keep_codes
from engine.ops.linear import Linear
from engine.ops.mxfp4 import TABLE

CPU = torch.device("cpu")
EIGHT_BITS = ("int8", "int8 and low", "e4m3")
pytestmark = pytest.mark.skipif(not can_keep_codes(torch.float32, CPU), reason="no native kernels")


def pair(
    kind: str, rows: int, columns: int, dtype: torch.dtype = torch.float32, bias: bool = False, group: int = CODE_BLOCK
) -> tuple[Linear, Linear]:
    """A coded layer of random codes, in two pieces, and the plain one of the same numbers."""
    generator = torch.Generator().manual_seed(rows)
    codes = torch.randint(0, 256 if kind in EIGHT_BITS else 16, (rows, columns), generator=generator).byte()
    table = None if kind != "table" else torch.randn(16, generator=generator)
    if kind == "e4m3":
        codes[codes & 0x7F == 0x7F] = 1  # no numbers
    scale = torch.randn(rows, columns // group, generator=generator) * 0.01
    low = torch.randn(scale.shape, generator=generator) * 0.02 if kind.endswith("low") else None
    if kind == "e4m3":
        numbers = codes.view(torch.float8_e4m3fn).float()
    elif kind in ("e2m1", "table"):
        numbers = (torch.tensor(TABLE) if table is None else table)[codes.int()]
    else:
        numbers = (codes if kind.startswith("int4") else codes.view(torch.int8)).float()
    numbers = numbers - 8 if kind == "int4" else numbers
    weight = numbers * scale.repeat_interleave(group, 1)
    if low is not None:
        weight += low.repeat_interleave(group, 1)
    cut = CodedLinear.piece_rows(rows // 2)
    added = torch.linspace(-1, 1, rows) if bias else None
    pieces = ((a, b, codes[a:b], scale[a:b], low[a:b] if low is not None else None) for a, b in ((0, cut), (cut, rows)))
    own = None if table is None else table.tolist()
    coded = CodedLinear(kind, rows, columns, dtype, pieces, added, group=group, table=own)
    plain = Linear(weight, added)
    plain.prepare(kind="native")
    return coded, plain


@pytest.mark.parametrize("kind", CODE_FORMS)
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


@pytest.mark.parametrize("kind", ["e2m1", "table"])
@pytest.mark.parametrize(("group", "columns"), [(16, 16), (16, 528), (48, 96), (64, 512), (256, 256)])
def test_scales_of_more_and_of_fewer_columns(kind: str, group: int, columns: int) -> None:
    coded, plain = pair(kind, 70, columns, group=group)
    x = torch.randn(200, columns, generator=torch.Generator().manual_seed(0))
    expected = plain(x)
    for count in (1, 2, 7, 200):
        assert torch.equal(coded(x[:count]), expected[:count])
    ids = torch.tensor([69, 3])
    assert torch.equal(coded.rows(ids), plain.rows(ids))


@pytest.mark.parametrize("columns", [32, 96, 288])
def test_short_rows(columns: int) -> None:
    coded, plain = pair("int4 and low", 40, columns)
    x = torch.randn(9, columns + 8)[:, :columns]  # strided
    assert torch.equal(coded(x), plain(x)) and torch.equal(coded(x[:1]), plain(x[:1]))


def test_inputs_in_bfloat16() -> None:
    """Widened, multiplied as float32, rounded once."""
    coded, plain = pair("int8", 48, 256, torch.bfloat16)
    x = torch.randn(7, 256).bfloat16()
    assert torch.equal(coded(x), plain(x.float()).bfloat16())
    assert torch.equal(coded(x[:1]), plain(x[:1].float()).bfloat16())
    assert coded.rows(torch.tensor([5])).dtype == torch.bfloat16


def test_threads_change_nothing() -> None:
    coded, _ = pair("e4m3", 1024, 512)
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
    for number, expected in enumerate((5, 6, 9, 10, 9, 5, 6)):
        assert library.hold.ol_codes_size(number, 1024, 1024) * 32 == expected * 1024 * 1024
    assert CODE_BLOCK == 32

"""Layers of small codes: bit for bit the layers of the float32 weights that the codes stand for, or of integers within
the error of packed layers, and with the same bits in any batch."""

from __future__ import annotations

import pytest
import torch

from engine.ops import native
from engine.ops.coded import CODE_BLOCK, CODE_FORMS, FORMS, can_keep_codes, coded_linear, fits
from engine.ops.linear import Linear
from engine.ops.mxfp4 import TABLE
from engine.ops.packed import OWN_KINDS, PackedLinear
from tests.ops.test_packed import relative_error

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
    cut = PackedLinear.piece_rows(rows // 2)
    added = torch.linspace(-1, 1, rows) if bias else None
    pieces = ((a, b, codes[a:b], scale[a:b], low[a:b] if low is not None else None) for a, b in ((0, cut), (cut, rows)))
    own = None if table is None else table.tolist()
    coded = coded_linear(kind, rows, columns, dtype, pieces, added, group=group, table=own)
    plain = Linear(weight, added)
    plain.prepare(kind="native")
    return coded, plain


def hold(coded: Linear, plain: Linear, x: torch.Tensor, counts: tuple[int, ...]) -> None:
    """One is the other's products, in any batch."""
    expected, found = plain(x), coded(x)
    if isinstance(coded, PackedLinear):
        assert relative_error(found, expected) < 3e-5
    else:
        assert torch.equal(found, expected)
    for count in counts:
        assert torch.equal(coded(x[:count]), found[:count])
    assert torch.equal(coded(x[3:4]), found[3:4])


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize(("rows", "columns"), [(77, 512), (64, 768)])
def test_products_of_the_plain_layer(kind: str, rows: int, columns: int) -> None:
    coded, plain = pair(kind, rows, columns, bias=rows == 77)
    assert isinstance(coded, PackedLinear) == (kind in OWN_KINDS)
    x = torch.randn(250, columns, generator=torch.Generator().manual_seed(0))
    hold(coded, plain, x, (1, 2, 5, 6, 7, 13, 193))
    ids = torch.tensor([0, rows - 1, 17, 17])
    assert torch.equal(coded.rows(ids), plain.rows(ids)) and torch.equal(coded.rows(ids.int()), plain.rows(ids))


@pytest.mark.parametrize(
    ("kind", "group", "columns"),
    [(kind, *sizes) for kind in ("e2m1", "table") for sizes in ((64, 512), (256, 256), (96, 96))]
    + [("e2m1", 16, 32), ("e2m1", 16, 544), ("e2m1", 48, 96), ("int4", 128, 512), ("int8 and low", 96, 96)],
)
def test_scales_of_more_and_of_fewer_columns(kind: str, group: int, columns: int) -> None:
    coded, plain = pair(kind, 70, columns, group=group)
    hold(coded, plain, torch.randn(200, columns, generator=torch.Generator().manual_seed(0)), (1, 2, 7, 200))
    ids = torch.tensor([69, 3])
    assert torch.equal(coded.rows(ids), plain.rows(ids))


def test_what_does_not_fit() -> None:
    assert fits("e2m1", 16, 64) and fits("int4", 64, 96) and fits("e4m3", 128, 128)
    assert not fits("e2m1", 16, 48) and not fits("e2m1", 8, 64) and not fits("int4", 16, 64)
    assert not fits("e4m3", 16, 64) and not fits("nf3", 32, 64)


@pytest.mark.parametrize("columns", [32, 96, 288])
def test_short_rows(columns: int) -> None:
    coded, plain = pair("int4 and low", 40, columns)
    hold(coded, plain, torch.randn(9, columns + 8)[:, :columns], (1, 5))  # strided


@pytest.mark.parametrize("kind", OWN_KINDS)
def test_inputs_of_eight_bits(kind: str) -> None:
    coded, plain = pair(kind, 48, 512)
    assert isinstance(coded, PackedLinear)
    x = torch.randn(9, 512)
    before = coded(x)
    coded.take_eight_bits()
    if not kind.startswith("int4"):
        assert coded.input_bits == 16 and torch.equal(coded(x), before)
        return
    assert coded.input_bits == 8 and not torch.equal(coded(x), before)
    assert relative_error(coded(x), plain(x)) < 1e-2 and torch.equal(coded(x[:2]), coded(x)[:2])


def test_inputs_in_bfloat16() -> None:
    """Widened, multiplied as float32, rounded once."""
    coded, plain = pair("e4m3", 48, 256, torch.bfloat16)
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
    for kind, number in CODE_FORMS.items():
        assert library.hold.ol_codes_size(number, 1024, 1024) * 32 == {"e4m3": 9, "table": 5}[kind] * 1024 * 1024
    for kind, (number, _) in OWN_KINDS.items():
        bits = {"int4": 5, "int4 and low": 6, "int8": 9, "int8 and low": 10, "e2m1": 6}[kind]
        assert library.hold.ol_packed_blocks(number, 1024, 1024) * 8 == bits * 1024 * 1024
    assert CODE_BLOCK == 32

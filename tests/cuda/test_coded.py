"""Products with weights that stay codes: the kernels against their torch reference, by Triton's interpreter or on the
GPU where there is one."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    # Read when a kernel is defined, so it comes before the imports below.
    os.environ["TRITON_INTERPRET"] = "1"

from engine.ops import device_coded  # noqa: E402
from engine.ops.device_coded import FORMS, DeviceCodedLinear, Piece, forms_kept, torch_numbers  # noqa: E402
from engine.ops.triton import coded  # noqa: E402

# The interpreter cannot multiply matrices of bfloat16.
NARROW = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
MANY = {"int4": 16, "int4 and low": 16, "int8": 256, "int8 and low": 256, "e4m3": 256, "e2m1": 16, "table": 16}
TABLE = torch.linspace(-1, 1, 16).pow(3).tolist()


def pieces(form: str, rows: int, columns: int, group: int, *, exact: bool = False) -> list[Piece]:
    """Two, of every code that there is. exact: scales that 16 bits hold."""
    generator = torch.Generator().manual_seed(rows + columns)
    codes = torch.randint(0, MANY[form], (rows, columns), generator=generator).to(torch.uint8)
    if form == "e4m3":
        codes[(codes & 0x7F) == 0x7F] = 1  # no numbers
    scale = 0.02 * (0.5 + torch.rand((rows, columns // group), generator=generator))
    low = 0.1 * torch.randn((rows, columns // group), generator=generator) if form.endswith("low") else None
    if exact:
        scale = scale.half().float()
    cut = rows // 3
    return [
        (0, cut, codes[:cut], scale[:cut], None if low is None else low[:cut]),
        (cut, rows, codes[cut:], scale[cut:], None if low is None else low[cut:]),
    ]


def meant(form: str, given: list[Piece]) -> Tensor:
    """float32 [rows, columns], from what was given, number by number."""
    parts = []
    for _, _, codes, scale, low in given:
        each = codes.shape[1] // scale.shape[1]
        if form == "e4m3":
            values = codes.view(torch.float8_e4m3fn).float()
        elif form == "e2m1":
            sizes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])[(codes & 7).int()]
            values = torch.where(codes >= 8, -sizes, sizes)
        elif form == "table":
            values = torch.tensor(TABLE)[codes.int()]
        elif form.startswith("int8"):
            values = torch.where(codes >= 128, codes.int() - 256, codes.int()).float()
        else:
            values = codes.float() - (8 if low is None else 0)
        values = values * scale.repeat_interleave(each, 1)
        parts.append(values if low is None else values + low.repeat_interleave(each, 1))
    return torch.cat(parts)


def one_rounding(form: str, given: list[Piece]) -> Tensor:
    """float32 [rows, columns]: how far numbers may be from `meant` where a product and what is added to it are rounded
    once, together: by the product's own rounding, and by what that changes in the sum's. 0 where nothing is added."""
    if not form.endswith("low"):
        return torch.zeros_like(meant(form, given))
    products = meant(form, [(a, b, codes, scale, torch.zeros_like(scale)) for a, b, codes, scale, _ in given])
    return torch.finfo(torch.float32).eps * (products.abs() / 2 + meant(form, given).abs())


def layer(
    form: str, given: list[Piece], group: int, dtype: torch.dtype, bias: Tensor | None = None
) -> DeviceCodedLinear:
    rows, columns = given[-1][1], given[0][2].shape[1]
    table = TABLE if form == "table" else None
    return DeviceCodedLinear(form, rows, columns, group, dtype, DEVICE, given, bias, table=table)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("group", [16, 32, 64])
def test_numbers_are_what_the_codes_mean(form: str, group: int) -> None:
    """In float32 exactly: by torch and by the kernel, all rows and some; columns that pair and ones that do not. But a
    GPU rounds once, where `low` is added."""
    for columns in (128, 96 if group < 64 else 192):
        given = pieces(form, 11, columns, group)
        linear, expected = layer(form, given, group, torch.float32), meant(form, given).to(DEVICE)
        assert torch.equal(torch_numbers(linear.codes, torch.float32), expected)
        slack = (one_rounding(form, given) if DEVICE.type == "cuda" else torch.zeros_like(expected)).to(DEVICE)
        assert ((coded.widened(linear.codes, torch.float32) - expected).abs() <= slack).all()
        ids = torch.tensor([7, 0, 10, 7], dtype=torch.int32, device=DEVICE)
        assert ((coded.widened(linear.codes, torch.float32, ids) - expected[ids]).abs() <= slack[ids]).all()
        assert ((linear.rows(ids) - expected[ids]).abs() <= slack[ids]).all()
        assert coded.widened(linear.codes, torch.float32, ids[:0]).shape == (0, columns)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, NARROW])
def test_product(form: str, dtype: torch.dtype) -> None:
    """Sizes that fit no tile; rows that are part of wider ones; with a bias and without; groups of 16, 32 and 64."""
    for group, columns, rows, bias in ((16, 96, 3, True), (32, 128, 20, False), (64, 128, 1, True)):
        given = pieces(form, 45, columns, group)
        added = torch.randn(45).to(DEVICE, dtype) if bias else None
        linear = layer(form, given, group, dtype, added)
        x = torch.randn(rows, 2 * columns).to(DEVICE, dtype)[:, :columns]
        expected = x.float() @ meant(form, given).to(DEVICE).T + (0 if added is None else added.float())
        ours = coded.coded_product(x, linear.codes, added, (16, 32, 1, 2))
        assert ours.dtype == dtype and ours.shape == (rows, 45)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        near = {"rtol": tolerance, "atol": tolerance * float(expected.abs().max())}  # some sums are almost nothing
        assert torch.allclose(ours.float(), expected, **near)
        assert torch.allclose(linear(x).float(), expected, **near)


def test_a_row_has_the_same_bits_among_others() -> None:
    given = pieces("int4", 40, 128, 32)
    linear = layer("int4", given, 32, NARROW)
    x = torch.randn(16, 128).to(DEVICE, NARROW)

    def product(some: Tensor) -> Tensor:
        return coded.coded_product(some, linear.codes, None, (16, 16, 1, 2))

    together = product(x)
    for row in (0, 7, 15):
        assert torch.equal(product(x[row : row + 1])[0], together[row])


def test_scales_take_as_few_bytes_as_they_can() -> None:
    """Neighbours that are the same are one; those that 16 bits hold are kept so."""
    given = [
        (start, stop, codes, scale[:, :1].expand(-1, 4), low)
        for start, stop, codes, scale, low in pieces("int4", 12, 128, 32, exact=True)
    ]
    linear = layer("int4", given, 32, NARROW)
    assert linear.codes.scale.shape == (1, 12) and linear.codes.scale.dtype == torch.float16
    assert linear.codes.codes.shape == (12, 64) and linear.num_bytes == 12 * 64 + 24
    assert torch.equal(linear.numbers(torch.float32), meant("int4", given).to(DEVICE))
    powers = [(a, b, codes, torch.full_like(scale, 2.0**-40), low) for a, b, codes, scale, low in given]
    assert layer("int4", powers, 32, NARROW).codes.scale.dtype == torch.bfloat16
    apart = layer("int4", pieces("int4", 12, 128, 32), 32, NARROW)
    assert apart.codes.scale.shape == (4, 12) and apart.codes.scale.dtype == torch.float32


def test_float8_is_kept_where_a_gpu_converts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    device, capability = torch.device("cuda", 0), (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert forms_kept(torch.bfloat16, device) == FORMS
    assert forms_kept(torch.float32, device) == forms_kept(torch.bfloat16, torch.device("cpu")) == ()
    capability = (8, 6)
    assert set(FORMS) - set(forms_kept(torch.float16, device)) == {"e4m3"}


def test_many_rows_are_multiplied_by_cublas(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = layer("int8", pieces("int8", 12, 64, 32), 32, torch.float32)
    asked: list[str] = []
    monkeypatch.setattr(DeviceCodedLinear, "by_codes", lambda self, x, tile: asked.append(f"codes {tile}"))
    monkeypatch.setattr(DeviceCodedLinear, "by_cublas", lambda self, x: asked.append("cublas"))
    linear.tiles[32] = device_coded.TILES[2]
    linear.widen_from = 40
    for rows in (1, 20, 40):
        linear(torch.zeros(rows, 64, device=DEVICE))
    assert asked == [f"codes {device_coded.TILES[0]}", f"codes {device_coded.TILES[2]}", "cublas"]


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch has such products on a CPU, too."""
    monkeypatch.setattr(device_coded, "has_scaled_product", lambda dtype, device: True)


@pytest.mark.usefixtures("scaled")
@pytest.mark.parametrize("bias", [False, True])
def test_inputs_of_float8(bias: bool) -> None:
    """Exactly the product of the rounded rows; of those that were rounded as near as four bits of a number are."""
    given = pieces("e4m3", 48, 64, 64)
    added = torch.randn(48).to(DEVICE, torch.bfloat16) if bias else None
    linear, weight = layer("e4m3", given, 64, torch.bfloat16, added), meant("e4m3", given).to(DEVICE)
    assert not linear.has_float8_inputs
    linear.take_float8_inputs()
    assert linear.has_float8_inputs and linear.float8_from == 1
    x = (torch.randn(20, 64) * torch.logspace(-3, 3, 20)[:, None]).to(DEVICE, torch.bfloat16)
    x[3] = 0
    codes, scale = device_coded.rounded_rows(x)
    assert torch.isfinite(codes.float()).all() and float(codes[4].float().abs().max()) == device_coded.E4M3_MOST
    ours, product = linear.by_float8(x).float(), (codes.float() * scale) @ weight.T
    if added is not None:  # rounded before it comes to the rounded product
        both = product.bfloat16() + added
        assert (ours - both.float()).abs().max() <= product.abs().max() * 2**-7
        return
    if DEVICE.type == "cuda":  # tensor cores keep some fourteen bits of the largest product of a sum, whatever is left
        assert ((ours - product).abs().amax(1) <= product.abs().amax(1) * 2**-7).all()
    else:
        assert torch.allclose(ours, product, rtol=1e-2, atol=1e-5)
    error = (ours - x.float() @ weight.T).norm(dim=1) / (x.float() @ weight.T).norm(dim=1).clamp_min(1e-9)
    assert float(error.max()) < 0.06 and float(error.mean()) < 0.04
    # A row is rounded alike whatever the others are.
    assert torch.equal(device_coded.rounded_rows(x[7:8])[0].float(), codes[7:8].float())
    x[5, 3] = torch.nan
    failed = linear.by_float8(x).isnan().all(dim=1)
    assert failed[5] and failed.sum() == 1


@pytest.mark.usefixtures("scaled")
def test_inputs_of_float8_from_a_number_of_rows_on(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = layer("e4m3", pieces("e4m3", 48, 64, 64), 64, torch.bfloat16)
    linear.take_float8_inputs()
    asked: list[str] = []
    for name in ("by_wide", "by_float8"):
        monkeypatch.setattr(DeviceCodedLinear, name, lambda self, x, name=name: asked.append(name))
    linear(torch.zeros(500, 64, device=DEVICE, dtype=torch.bfloat16))
    linear.ways = (*linear.ways[:2], 40)
    for rows in (39, 40):
        linear(torch.zeros(rows, 64, device=DEVICE, dtype=torch.bfloat16))
    assert asked == ["by_float8", "by_wide", "by_float8"]


@pytest.mark.usefixtures("scaled")
def test_what_has_no_product_of_float8() -> None:
    for form, rows in (("int8", 48), ("e4m3", 40)):
        linear = layer(form, pieces(form, rows, 64, 64), 64, torch.bfloat16)
        linear.take_float8_inputs()
        assert not linear.has_float8_inputs


def test_gpus_with_products_of_float8(monkeypatch: pytest.MonkeyPatch) -> None:
    device, capability = torch.device("cuda", 0), (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    has = device_coded.has_scaled_product
    assert has(torch.bfloat16, device)
    assert not has(torch.float16, device) and not has(torch.bfloat16, torch.device("cpu"))
    capability = (8, 9)
    assert not has(torch.bfloat16, device)

"""engine/ops/linear.py: every way of multiplying against float64, and rows that do not depend on their batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.ops import native
from engine.ops.linear import Linear, choose_kind

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 1), (7, 5), (16, 64), (33, 257), (130, 300), (96, 1031)]
ROWS = [1, 2, 3, 5, 6, 7, 12, 13, 64, 200]


def close(got: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Within the rounding of the sums (float32) and of the result."""
    exact = x.double() @ weight.double().T
    size = x.double().abs() @ weight.double().abs().T
    if bias is not None:
        exact += bias.double()
    tolerance = 1e-5 * size + 1e-12
    if got.dtype == torch.bfloat16:
        tolerance += 2**-8 * exact.abs()
    assert got.dtype == x.dtype and got.shape == exact.shape
    assert ((got.double() - exact).abs() <= tolerance).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_matches_float64(mode: str, dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    for out_features, in_features in SHAPES:
        weight = torch.randn(out_features, in_features).to(dtype)
        vector = torch.randn(out_features).to(dtype) if bias else None
        linear = Linear(weight, vector)
        linear.prepare(kind=mode)
        assert linear.kind == mode
        assert (linear.out_features, linear.in_features) == (out_features, in_features)
        for rows in ROWS:
            x = torch.randn(rows, in_features).to(dtype)
            close(linear(x), x, weight, vector)


def test_choice(kernels: native.Library) -> None:
    cpu = torch.device("cpu")
    assert choose_kind(torch.float16, cpu) == "torch"
    assert choose_kind(torch.bfloat16, torch.device("meta")) == "torch"
    own = "native" if kernels.lanes >= 8 else "torch"
    assert choose_kind(torch.float32, cpu) == own
    with native.disabled():
        assert choose_kind(torch.float32, cpu) == "torch"


@pytest.mark.parametrize(
    ("flags", "multiplies", "kind"),
    [
        ({"avx512f", "avx512_bf16"}, True, "native"),
        ({"avx512f", "avx512_bf16"}, False, "onednn"),  # a compiler that does not know the instruction
        ({"avx512f", "avx512_bf16", "amx_bf16"}, True, "onednn"),
        ({"avx2"}, False, "native"),
    ],
)
def test_choice_for_bfloat16(
    kernels: native.Library, monkeypatch: pytest.MonkeyPatch, flags: set[str], multiplies: bool, kind: str
) -> None:
    monkeypatch.setattr(native, "cpu_flags", lambda: frozenset(flags))
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(kernels, "multiplies_bf16", multiplies)
    monkeypatch.setattr(kernels, "lanes", 16)
    assert choose_kind(torch.bfloat16, torch.device("cpu")) == kind
    with native.disabled():
        assert choose_kind(torch.bfloat16, torch.device("cpu")) == ("onednn" if "avx512f" in flags else "torch")


@pytest.mark.parametrize("kind", ["torch", "onednn"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_other_kinds(kind: str, dtype: torch.dtype) -> None:
    if kind == "onednn" and dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("no bf16 in this processor")
    weight, bias, x = torch.randn(48, 96).to(dtype), torch.randn(48).to(dtype), torch.randn(5, 96).to(dtype)
    for vector in (None, bias):
        linear = Linear(weight, vector)
        linear.prepare(kind=kind)
        assert linear.kind == kind
        close(linear(x), x, weight, vector)


def test_without_the_bf16_instruction(kernels: native.Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other layout of bf16, which machines without AVX512-BF16 take, on a machine that has it."""
    if not kernels.multiplies_bf16:
        pytest.skip("this machine takes it anyway")
    for name, value in (("_library", None), ("_tried", False), ("FLAGS", (*native.FLAGS, "-mno-avx512bf16"))):
        monkeypatch.setattr(native, name, value)
    other = native.library()
    assert other is not None and not other.multiplies_bf16
    test_matches_float64("native", torch.bfloat16, True)
    test_row_is_the_same_alone_and_in_a_batch(other, torch.bfloat16)
    test_rows_of_the_weight("native", torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_is_the_same_alone_and_in_a_batch(kernels: native.Library, dtype: torch.dtype) -> None:
    """K spans several blocks of sums; the batches cross all tile heights and the block of rows."""
    torch.manual_seed(1)
    for out_features, in_features in [(130, 1100), (512, 300)]:
        linear = Linear(torch.randn(out_features, in_features).to(dtype), torch.randn(out_features).to(dtype))
        linear.prepare(kind="native")
        x = torch.randn(450, in_features).to(dtype)
        alone = torch.cat([linear(x[i : i + 1]) for i in range(40)])
        for rows in [*range(2, 27), 40, 191, 192, 193, 197, 450]:
            for threads in (1, 3):
                torch.set_num_threads(threads)
                batch = linear(x[:rows])
                torch.set_num_threads(1)
                n = min(rows, 40)
                assert torch.equal(batch[:n], alone[:n]), (rows, threads)
        assert torch.equal(linear(x[7:29]), alone[7:29]), "the place in the batch"


def test_strided_and_empty_inputs(mode: str) -> None:
    weight = torch.randn(40, 24)
    linear = Linear(weight)
    linear.prepare()
    wide = torch.randn(9, 60)
    close(linear(wide[:, 8:32]), wide[:, 8:32], weight, None)
    close(linear(wide.T[:24].T), wide[:, :24], weight, None)
    assert linear(wide[:0, :24]).shape == (0, 40)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_the_weight(mode: str, dtype: torch.dtype) -> None:
    weight = torch.randn(77, 50).to(dtype)
    linear = Linear(weight.clone())
    linear.prepare(keep_rows=True)
    for ids in (
        torch.tensor([0, 76, 15, 16, 31, 8, 8]),
        torch.arange(77, dtype=torch.int32),
        torch.tensor([], dtype=torch.int32),
    ):
        assert torch.equal(linear.rows(ids), weight[ids.long()])


def test_rows_refuses_bad_ids(kernels: native.Library) -> None:
    linear = Linear(torch.randn(10, 16))
    linear.prepare(kind="native")
    for bad in (-1, 10):
        with pytest.raises(AssertionError, match="out of range"):
            linear.rows(torch.tensor([bad]))


def test_plain_weight_is_dropped(kernels: native.Library) -> None:
    linear = Linear(torch.randn(64, 64))
    linear.prepare(kind="native")
    assert not any(isinstance(value, Tensor) and value.dim() == 2 for value in vars(linear).values())

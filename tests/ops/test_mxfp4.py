"""engine/ops/mxfp4.py: every code and exponent, products against float64, and a row's bits in any company."""

from __future__ import annotations

import pytest
import torch

from engine.ops import native
from engine.ops.mxfp4 import TABLE, Mxfp4Linear, dequantised, mxfp4_linear
from engine.ops.packed import PackedLinear


def layer(
    out: int, into: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[PackedLinear | Mxfp4Linear, torch.Tensor, torch.Tensor]:
    """With its weight, float64, and bias."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (out, into // 32, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(120, 130, (out, into // 32), generator=generator, dtype=torch.uint8)
    bias = torch.randn(out, generator=generator)
    return mxfp4_linear(blocks, scales, bias, dtype), dequantised(blocks, scales, torch.float64), bias


def test_every_code_and_exponent(mode: str) -> None:
    """One row for each exponent, which has every code; inputs that pick one number each."""
    codes = torch.arange(32) % 16
    blocks = (codes[::2] | codes[1::2] << 4).to(torch.uint8).expand(255, 1, 16).contiguous()
    scales = torch.arange(255, dtype=torch.uint8)[:, None].contiguous()
    exact = torch.tensor([TABLE[code] for code in codes], dtype=torch.float64) * 2.0 ** (
        torch.arange(255, dtype=torch.float64)[:, None] - 127
    )
    # The least and the greatest exponents leave the range of float32 with some codes.
    inside = slice(2, 252)
    got = mxfp4_linear(blocks, scales, torch.zeros(255), torch.float32)(torch.eye(32))[:, inside]
    assert torch.equal(got.double(), exact.T[:, inside])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("out", "into"), [(7, 32), (50, 96), (33, 288)])
def test_products(mode: str, out: int, into: int, dtype: torch.dtype) -> None:
    linear, weight, bias = layer(out, into, dtype)
    for rows in (1, 2, 3, 5, 9):
        x = torch.randn(rows, into, generator=torch.Generator().manual_seed(rows)).to(dtype)
        exact = x.double() @ weight.T + bias.double()
        got = linear(x)
        assert got.dtype == dtype and got.shape == exact.shape
        limit = 1e-2 if dtype == torch.bfloat16 else 1e-5 if isinstance(linear, Mxfp4Linear) else 1e-4  # 16-bit inputs
        assert (got.double() - exact).abs().max() <= limit * exact.abs().max()


def test_a_row_alone_has_the_bits_it_has_in_company(kernels: native.Library) -> None:
    linear, _, _ = layer(37, 160)
    x = torch.randn(11, 160)
    together = linear(x)
    torch.set_num_threads(3)
    assert torch.equal(linear(x), together)
    torch.set_num_threads(1)
    for first, last in ((0, 1), (4, 5), (3, 9), (10, 11)):
        assert torch.equal(linear(x[first:last]), together[first:last])

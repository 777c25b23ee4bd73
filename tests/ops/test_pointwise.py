"""Norms, activations and rope: native and torch against float64, odd sizes, strides, rows alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from engine.ops import native
from engine.ops.activation import PLAIN_ACTIVATIONS, by_rows, gelu_tanh_and_mul, silu_and_mul, xielu
from engine.ops.norm import add_rms_norm, rms_norm
from engine.ops.rope import apply_rope

DTYPES = [torch.float32, torch.bfloat16]
SIZES = [(1, 1), (3, 7), (2, 8), (5, 31), (4, 64), (9, 100), (2, 1029), (40, 2048)]


def close(got: Tensor, exact: Tensor, floor: float = 1e-6) -> None:
    """Relative error 1e-5 in float32, half a unit in the last place of bf16 on top."""
    tolerance = (1e-5 if got.dtype == torch.float32 else 2**-8 * 1.01) * exact.abs() + floor
    assert ((got.double() - exact).abs() <= tolerance).all(), (got.double() - exact).abs().max()


def norm64(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.double()
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * weight.double()


# Of x and of the norm's weight.
NORMED = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]


@pytest.mark.parametrize(("dtype", "weighed"), NORMED)
def test_rms_norm(mode: str, dtype: torch.dtype, weighed: torch.dtype) -> None:
    torch.manual_seed(0)
    for rows, width in SIZES:
        x, weight = (3 * torch.randn(rows, width)).to(dtype), torch.randn(width).to(weighed)
        before = x.clone()
        close(rms_norm(x, weight, 1e-5), norm64(x, weight, 1e-5))
        assert torch.equal(x, before)
    wide = torch.randn(6, 80).to(dtype)
    close(rms_norm(wide[:, 10:50], torch.ones(40, dtype=dtype), 1e-5), norm64(wide[:, 10:50], torch.ones(40), 1e-5))
    assert rms_norm(wide[:0], torch.ones(80, dtype=dtype), 1e-5).shape == (0, 80)


@pytest.mark.parametrize(("dtype", "weighed"), NORMED)
def test_add_rms_norm(mode: str, dtype: torch.dtype, weighed: torch.dtype) -> None:
    torch.manual_seed(0)
    for rows, width in SIZES:
        x, residual = torch.randn(rows, width).to(dtype), torch.randn(rows, width).to(dtype)
        weight = torch.randn(width).to(weighed)
        total, memory = x + residual, residual.data_ptr()
        normed, summed = add_rms_norm(x, residual, weight, 1e-6)
        assert torch.equal(summed, total) and summed.data_ptr() == memory
        close(normed, norm64(total, weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations(mode: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for rows, width in SIZES:
        x = (4 * torch.randn(rows, 2 * width)).to(dtype)
        gate, up = x.double().chunk(2, -1)
        close(silu_and_mul(x), torch.nn.functional.silu(gate) * up, 1e-30)
        # In its tail the tanh form is 1 - 1 in any float32 formula.
        close(gelu_tanh_and_mul(x), torch.nn.functional.gelu(gate, approximate="tanh") * up, 5e-6)
    large = torch.tensor([[-1e4, 1e4, -90.0, 90.0, 1.0, 1.0, 1.0, 1.0]]).to(dtype)
    assert torch.allclose(silu_and_mul(large), torch.tensor([[0.0, 1e4, 0.0, 90.0]]).to(dtype), atol=1e-30)
    assert silu_and_mul(torch.tensor([[float("nan"), 1.0]]).to(dtype)).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wide", [False, True])
def test_rope(mode: str, dtype: torch.dtype, wide: bool) -> None:
    torch.manual_seed(0)
    for dim, rot in [(2, 2), (64, 64), (80, 32), (128, 128), (24, 20), (10, 6)]:
        angles = torch.arange(50)[:, None] / 100 ** (torch.arange(0, rot, 2) / rot)
        table = torch.cat((angles.cos(), angles.sin()), -1).float()
        tokens, heads, kv_heads = 37, 3, 2
        qkv = torch.randn(tokens, heads + 2 * kv_heads, dim).to(dtype)
        before = qkv.clone()
        q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
        positions = torch.randint(0, 50, (tokens,), dtype=torch.int64 if wide else torch.int32)
        apply_rope(q, k, table, positions)
        cos, sin = table.double()[positions.long()][:, None].chunk(2, -1)
        for got, x in ((q, before[:, :heads]), (k, before[:, heads : heads + kv_heads])):
            a, b = x[..., :rot].double().chunk(2, -1)
            close(got, torch.cat((a * cos - b * sin, b * cos + a * sin, x[..., rot:].double()), -1))
        assert torch.equal(v, before[:, heads + kv_heads :])


def row_ops(dtype: torch.dtype) -> list[Callable[[Tensor], Tensor]]:
    weight = torch.randn(302).to(dtype)
    return [
        lambda x: rms_norm(x, weight, 1e-5),
        lambda x: rms_norm(x, weight.float() + 1, 1e-5),
        lambda x: add_rms_norm(x, x.flip(1).clone(), weight, 1e-5)[0],
        silu_and_mul,
        gelu_tanh_and_mul,
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_is_the_same_alone_and_in_a_batch(kernels: native.Library, dtype: torch.dtype) -> None:
    x = torch.randn(300, 302).to(dtype)
    for op in row_ops(dtype):
        alone = torch.cat([op(x[i : i + 1]) for i in range(20)])
        torch.set_num_threads(2)
        assert torch.equal(op(x)[:20], alone)
        torch.set_num_threads(1)


UNGATED = {
    **PLAIN_ACTIVATIONS,
    "xielu": lambda x: xielu(x, torch.tensor([0.7]), torch.tensor([1.1])),
    "sigmoid": lambda x: by_rows(torch.sigmoid, x),
}


@pytest.mark.parametrize("name", UNGATED)
def test_a_row_has_the_same_bits_in_any_batch(name: str) -> None:
    """Also of widths that are no whole vectors, and with threads that share the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for rows, width in ((7, 13), (513, 60), (5, 9000)):
            x = torch.randn(rows, width, generator=torch.Generator().manual_seed(width)) * 3
            whole = UNGATED[name](x.clone())
            assert all(torch.equal(whole[row], UNGATED[name](x[row : row + 1].clone())[0]) for row in range(rows))
    finally:
        torch.set_num_threads(before)

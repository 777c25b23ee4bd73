"""A layer of BERT's form in one call: against float64, and the same bits of a text in any company on any threads."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ops import native
from engine.ops.encoder import ACTIVATIONS, EncoderLayer
from engine.ops.linear import Linear
from engine.ops.norm import add_layer_norm, layer_norm

HEADS, INNER = 3, 72
LENGTHS = [1, 2, 7, 8, 9, 33, 64, 190]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Parts:
    """Weights of a layer, and what it computes in float64. bias: everything has one."""

    def __init__(self, dim: int, dtype: torch.dtype, *, bias: bool) -> None:
        torch.manual_seed(dim)
        self.width = HEADS * dim + 5  # no whole number of vectors
        sizes = [(3 * HEADS * dim, self.width), (self.width, HEADS * dim), (INNER, self.width), (self.width, INNER)]
        self.weights = [(torch.randn(size) / size[1] ** 0.5).to(dtype) for size in sizes]
        self.biases = [torch.randn(size[0]).to(dtype) if bias else None for size in sizes]
        self.norms = [(1 + 0.1 * torch.randn(self.width), torch.randn(self.width) if bias else None) for _ in range(2)]
        self.dim, self.scale = dim, 1.3 * dim**-0.5

    def layer(self, activation: str) -> EncoderLayer:
        products = []
        for weight, bias in zip(self.weights, self.biases, strict=True):
            product = Linear(weight.clone(), None if bias is None else bias.clone())
            product.prepare(kind="native")
            products.append(product)
        assert EncoderLayer.takes(products, self.dim, activation)
        norms = [(*norm, eps) for norm, eps in zip(self.norms, (1e-12, 1e-3), strict=True)]
        return EncoderLayer(products, norms, heads=HEADS, head_dim=self.dim, scale=self.scale, activation=activation)

    def exact(self, x: Tensor, activation: str) -> Tensor:
        """Of one text."""

        def product(x: Tensor, index: int) -> Tensor:
            bias = self.biases[index]
            return F.linear(x, self.weights[index].double(), None if bias is None else bias.double())

        def norm(x: Tensor, index: int, eps: float) -> Tensor:
            weight, bias = self.norms[index]
            return F.layer_norm(x, (self.width,), weight.double(), None if bias is None else bias.double(), eps)

        x = x.double()
        q, k, v = product(x, 0).view(-1, 3, HEADS, self.dim).permute(1, 2, 0, 3)
        mixed = F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(0, 1).flatten(1)
        x = norm(x + product(mixed, 1), 0, 1e-12)
        y = product(x, 2)
        inner = (
            y.relu() if activation == "relu" else F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")
        )
        return norm(x + product(inner, 3), 1, 1e-3)


def starts_of(lengths: list[int]) -> np.ndarray:
    return np.array([0, *itertools.accumulate(lengths)], np.int32)


pytestmark = pytest.mark.skipif(native.library() is None, reason="no native kernels")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_layer_is_that_of_float64(dtype: torch.dtype, activation: str) -> None:
    for dim, bias in ((16, True), (32, False), (64, True)):
        parts = Parts(dim, dtype, bias=bias)
        x = torch.randn(sum(LENGTHS), parts.width).to(dtype)
        exact = torch.cat([parts.exact(text, activation) for text in x.split_with_sizes(LENGTHS)])
        got = parts.layer(activation)(x.clone(), starts_of(LENGTHS)).double()
        tolerance = 2e-5 if dtype == torch.float32 else 0.06
        assert (got - exact).abs().max() <= tolerance, (dim, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_text_has_the_same_bits_in_any_company(dtype: torch.dtype) -> None:
    parts = Parts(32, dtype, bias=True)
    layer = parts.layer("gelu")
    texts = [torch.randn(length, parts.width).to(dtype) for length in LENGTHS * 3]
    torch.set_num_threads(1)
    alone = [layer(text.clone(), starts_of([len(text)])) for text in texts]
    order = torch.randperm(len(texts)).tolist()
    for count, threads in itertools.product((2, 5, len(texts)), (1, 2, 3)):
        torch.set_num_threads(threads)
        chosen = order[:count]
        lengths = [len(texts[index]) for index in chosen]
        together = layer(torch.cat([texts[index] for index in chosen]), starts_of(lengths))
        for index, rows in zip(chosen, together.split_with_sizes(lengths), strict=True):
            assert torch.equal(rows, alone[index]), (count, threads, index)


def test_not_a_number_stays_in_its_text() -> None:
    parts = Parts(16, torch.float32, bias=True)
    x = torch.randn(20, parts.width)
    x[13, 2] = torch.nan
    got = parts.layer("gelu")(x, starts_of([10, 5, 5]))
    assert got[10:15].isnan().all() and got[:10].isfinite().all() and got[15:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_norms(mode: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for rows, width in [(1, 1), (3, 7), (2, 8), (5, 31), (4, 64), (9, 100), (2, 1029), (40, 2048)]:
        x, residual = (2 + 3 * torch.randn(rows, width)).to(dtype), torch.randn(rows, width).to(dtype)
        weight = torch.randn(width)
        for bias in (None, torch.randn(width)):
            wide = None if bias is None else bias.double()
            total, memory = x + residual, residual.data_ptr()
            summed = residual.clone()
            for got, given in (
                (layer_norm(x, weight, bias, 1e-5), x),
                (add_layer_norm(x, summed, weight, bias, 1e-5)[0], total),
            ):
                exact = F.layer_norm(given.double(), (width,), weight.double(), wide, 1e-5)
                bound = (1e-5 if dtype == torch.float32 else 2**-8 * 1.01) * exact.abs() + 1e-5
                assert ((got.double() - exact).abs() <= bound).all()
            assert torch.equal(summed, total) and residual.data_ptr() == memory
    wide_rows = torch.randn(6, 80).to(dtype)
    part = layer_norm(wide_rows[:, 10:50], torch.ones(40), None, 1e-5)
    assert torch.equal(part, layer_norm(wide_rows[:, 10:50].contiguous(), torch.ones(40), None, 1e-5))

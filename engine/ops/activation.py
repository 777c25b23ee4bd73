"""Activations of the MLP in float32, rounded once: gated ones, act(first half) * second half, and plain ones.

Called by models/ on the executor's thread; native kernels where they know the dtype, torch otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ops import native
from engine.ops.triton.runtime import on_gpu

# Floats of the widest vectors that torch computes at a time, and elements that it gives to one thread at least.
LANES, GRAIN = 64, 32768


def silu_and_mul(x: Tensor) -> Tensor:
    """[N, 2I] -> [N, I]."""
    return _gate_and_mul(x, gelu=False)


def gelu_tanh_and_mul(x: Tensor) -> Tensor:
    """[N, 2I] -> [N, I], with the tanh form of GELU."""
    return _gate_and_mul(x, gelu=True)


def gelu_and_mul(x: Tensor) -> Tensor:
    """[N, 2I] -> [N, I], with GELU itself."""
    gate, up = x.chunk(2, dim=-1)
    return (_activated(gate.float(), 1, F.gelu) * up.float()).to(x.dtype)


def clamped_and_mul(x: Tensor, limit: float, alpha: float) -> Tensor:
    """[N, 2I], gates and what they multiply in turn -> [N, I]: g sigmoid(alpha g) (u + 1), both clamped first."""
    gate = x[:, ::2].float().clamp(max=limit)
    up = x[:, 1::2].float().clamp(-limit, limit)
    return (by_rows(lambda g: g * torch.sigmoid(alpha * g), gate) * (up + 1)).to(x.dtype)


class Clamped(NamedTuple):
    """`clamped_and_mul` with these."""

    limit: float
    alpha: float


GATED_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu_and_mul,
    "gelu_tanh": gelu_tanh_and_mul,
    "gelu": gelu_and_mul,
}


def by_rows(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """An elementwise function of [N, W] in float32, a row's bits whatever its place.

    torch computes the last elements of a range by other code than the rest, and threads get ranges that begin
    anywhere: so rows are filled up to whole vectors, and no more are given at once than one thread takes.
    """
    wide = x.float()
    if not x.is_cpu:
        return function(wide)
    width = x.shape[1]
    if width % LANES:
        wide = F.pad(wide, (0, -width % LANES))
    rows = max(1, GRAIN // wide.shape[1])
    if len(wide) <= rows:
        return function(wide)[:, :width]
    return torch.cat([function(part) for part in wide.split(rows)])[:, :width]


def relu2(x: Tensor) -> Tensor:
    """relu(x)^2, in place."""
    return x.relu_().square_()


def gelu(x: Tensor) -> Tensor:
    return _activated(x, 1, F.gelu)


def gelu_tanh(x: Tensor) -> Tensor:
    return _activated(x, 2, partial(F.gelu, approximate="tanh"))


def _activated(x: Tensor, kind: int, function: Callable[[Tensor], Tensor]) -> Tensor:
    """By our own kernel, whose number of it `kind` is, or by torch."""
    library, code = native.library(), native.type_code(x.dtype)
    if library is None or code is None or not x.is_cpu or x.stride(1) != 1:
        return by_rows(function, x).to(x.dtype)
    rows, width = x.shape
    out = torch.empty((rows, width), dtype=x.dtype)
    library.by_work(4 * rows * width).ol_activate(
        code, x.data_ptr(), x.stride(0), out.data_ptr(), rows, width, kind, torch.get_num_threads()
    )
    return out


def xielu(x: Tensor, above: Tensor, below: Tensor) -> Tensor:
    """xIELU (arXiv 2411.13010) of sizes [1]: above x^2 + x/2 for x > 0, else below (e^x - 1 - x) + x/2."""

    def function(x: Tensor) -> Tensor:
        return torch.where(x > 0, above * x * x, (torch.expm1(x.clamp_max(-1e-6)) - x) * below) + 0.5 * x

    return by_rows(function, x).to(x.dtype)


# Without a gate, [N, I] -> [N, I]; the input may be written over.
PLAIN_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu2": relu2,
    "relu": torch.relu_,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
}


def _gate_and_mul(x: Tensor, *, gelu: bool) -> Tensor:
    if on_gpu(x):
        from engine.ops.triton import activation as kernels

        return kernels.gate_and_mul(x, gelu=gelu)
    library, code = native.library(), native.type_code(x.dtype)
    if library is None or code is None or not x.is_cpu or x.stride(1) != 1:
        return torch_gate_and_mul(x, gelu=gelu)
    rows, inner = x.shape[0], x.shape[1] // 2
    out = torch.empty((rows, inner), dtype=x.dtype)
    library.by_work(4 * rows * inner).ol_gate_and_mul(
        code, x.data_ptr(), x.stride(0), out.data_ptr(), rows, inner, gelu, torch.get_num_threads()
    )
    return out


def torch_gate_and_mul(x: Tensor, *, gelu: bool) -> Tensor:
    """The same in torch."""
    gate, up = x.float().chunk(2, dim=-1)
    activated = F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)
    return (activated * up).to(x.dtype)


def activated(inner: Tensor, activation: str | Clamped) -> Tensor:
    """[N, 2 * inner], gates first -> [N, inner]: by one of GATED_ACTIVATIONS, or clamped."""
    if isinstance(activation, Clamped):
        gate, up = inner.chunk(2, dim=1)
        return clamped_and_mul(torch.stack((gate, up), 2).flatten(1), *activation)
    return GATED_ACTIVATIONS[activation](inner)

"""Activations of the MLP in float32, rounded once: gated ones, act(first half) * second half, and plain ones.

Called by models/ on the executor's thread; native kernels where they know the dtype, torch otherwise.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ops import native
from engine.ops.triton.runtime import on_gpu


def silu_and_mul(x: Tensor) -> Tensor:
    """[N, 2I] -> [N, I]."""
    return _gate_and_mul(x, gelu=False)


def gelu_tanh_and_mul(x: Tensor) -> Tensor:
    """[N, 2I] -> [N, I], with the tanh form of GELU."""
    return _gate_and_mul(x, gelu=True)


GATED_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": silu_and_mul, "gelu_tanh": gelu_tanh_and_mul}


def relu2(x: Tensor) -> Tensor:
    """relu(x)^2, in place."""
    return x.relu_().square_()


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x)


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


# Without a gate, [N, I] -> [N, I]; the input may be written over.
PLAIN_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu2": relu2, "gelu": gelu, "gelu_tanh": gelu_tanh}


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

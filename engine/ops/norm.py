"""Norms in float32, rounded once: root-mean-square, x / sqrt(mean(x^2) + eps) * weight, and LayerNorm.

Called by models/ on the executor's thread; native kernels where they know the dtype, torch otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ops import native
from engine.ops.triton.runtime import on_gpu


@dataclass(frozen=True, slots=True)
class Normed:
    """x [N, width] and a norm that is still to be taken of it: a product of few rows does so while it reads x.

    To be used before x changes, which the stream of residuals does in place.
    """

    x: Tensor
    weight: Tensor
    eps: float

    @property
    def shape(self) -> torch.Size:
        return self.x.shape


def plain(x: Tensor | Normed) -> Tensor:
    """[N, width], computed."""
    return rms_norm(x.x, x.weight, x.eps) if isinstance(x, Normed) else x


def _type_of(weight: Tensor, x: Tensor) -> int | None:
    """How the kernel calls a weight of float32 or of x's dtype; None for another, which it cannot take."""
    return native.type_code(weight.dtype) if weight.dtype in (torch.float32, x.dtype) else None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[N, width], [width] of the same dtype or in float32 -> [N, width], a new tensor."""
    if on_gpu(x):
        from engine.ops.triton import norm as kernels

        return kernels.rms_norm(x, weight, eps)
    library, code, of_weight = native.library(), native.type_code(x.dtype), _type_of(weight, x)
    if library is None or code is None or not x.is_cpu or of_weight is None or x.stride(1) != 1:
        return torch_rms_norm(x, weight, eps)
    rows, width = x.shape
    out = torch.empty((rows, width), dtype=x.dtype)
    library.by_work(rows * width).ol_rms_norm(
        code,
        x.data_ptr(),
        x.stride(0),
        None,
        0,
        of_weight,
        weight.data_ptr(),
        out.data_ptr(),
        width,
        rows,
        width,
        eps,
        torch.get_num_threads(),
    )
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, residual [N, width] -> (norm of their sum, their sum); the sum takes the residual's memory.

    The sum is rounded to the dtype before its norm, as a stored residual stream is.
    """
    if on_gpu(x):
        from engine.ops.triton import norm as kernels

        return kernels.add_rms_norm(x, residual, weight, eps)
    library, code, of_weight = native.library(), native.type_code(x.dtype), _type_of(weight, x)
    if (
        library is None
        or code is None
        or not x.is_cpu
        or of_weight is None
        or residual.dtype != x.dtype
        or x.stride(1) != 1
        or residual.stride(1) != 1
    ):
        residual = residual.add_(x)
        return torch_rms_norm(residual, weight, eps), residual
    rows, width = x.shape
    out = torch.empty((rows, width), dtype=x.dtype)
    library.by_work(rows * width).ol_rms_norm(
        code,
        x.data_ptr(),
        x.stride(0),
        residual.data_ptr(),
        residual.stride(0),
        of_weight,
        weight.data_ptr(),
        out.data_ptr(),
        width,
        rows,
        width,
        eps,
        torch.get_num_threads(),
    )
    return out, residual


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """[N, width], float32 [width] and [width] or None -> [N, width], a new tensor: LayerNorm in float32."""
    library, code = native.library(), native.type_code(x.dtype)
    if library is None or code is None or not x.is_cpu or x.stride(1) != 1:
        return torch_layer_norm(x, weight, bias, eps)
    return _layer_norm(library, code, x, None, weight, bias, eps)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """x, residual [N, width] -> (LayerNorm of their sum, their sum), as `add_rms_norm`."""
    library, code = native.library(), native.type_code(x.dtype)
    dense = x.stride(1) == 1 == residual.stride(1) and residual.dtype == x.dtype
    if library is None or code is None or not x.is_cpu or not dense:
        residual = residual.add_(x)
        return torch_layer_norm(residual, weight, bias, eps), residual
    return _layer_norm(library, code, x, residual, weight, bias, eps), residual


def _layer_norm(
    library: native.Library,
    code: int,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    rows, width = x.shape
    out = torch.empty((rows, width), dtype=x.dtype)
    library.by_work(rows * width).ol_layer_norm(
        code,
        x.data_ptr(),
        x.stride(0),
        None if residual is None else residual.data_ptr(),
        0 if residual is None else residual.stride(0),
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        rows,
        width,
        eps,
        torch.get_num_threads(),
    )
    return out


def as_rows(x: Tensor, width: int) -> Tensor:
    """[T, heads, D] -> [-1, width], x.reshape; where it must copy, by a kernel: a recorded step makes that again."""
    library = native.library()
    within = x.stride(2) == 1 and x.stride(1) == x.shape[2]
    if x.is_contiguous() or library is None or not x.is_cpu or not within or x.shape[0] > 64:
        return x.reshape(-1, width)
    out = torch.empty(x.shape, dtype=x.dtype)
    size = x.element_size()
    bytes_of_token = x.shape[1] * x.shape[2] * size
    library.hold.ol_copy_rows(x.data_ptr(), x.stride(0) * size, x.shape[0], bytes_of_token, out.data_ptr())
    return out.view(-1, width)


def torch_layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """The same in torch."""
    return F.layer_norm(x.float(), weight.shape, weight, bias, eps).to(x.dtype)


def torch_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same in torch."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.float()).to(x.dtype)

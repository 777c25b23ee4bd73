"""The norms of a layer: plain callables over their weight. Run by the executor's thread."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from engine.models.parts.source import Source
from engine.models.spec import NormSpec
from engine.ops.norm import add_rms_norm, rms_norm


def make_norm(spec: NormSpec, source: Source, prefix: str, width: int) -> Norm:
    """The one that `spec` describes. prefix: of its tensors."""
    return (CenteredNorm if spec.centered else Norm)(spec, source, prefix, width)


class Norm:
    """RMS norm over the last dimension: x / sqrt(mean(x^2) + eps) * (offset + weight).

    With an offset the weight is kept in float32: 1 + weight would lose the weight's low bits in 16.
    """

    def __init__(self, spec: NormSpec, source: Source, prefix: str, width: int) -> None:
        self._eps = spec.eps
        self._weight = source.tensor(f"{prefix}{spec.name}.weight", (width,))
        if spec.offset:
            self._weight = self._weight.float() + spec.offset

    def __call__(self, x: Tensor) -> Tensor:
        """[N, width] -> [N, width]."""
        return rms_norm(x, self._weight, self._eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """x and residual [N, width] -> (norm of their sum, their sum). The sum takes the residual's memory."""
        return add_rms_norm(x, residual, self._weight, self._eps)


class CenteredNorm(Norm):
    """LayerNorm: x less its mean, over its standard deviation, times the weight, and the bias where there is one."""

    def __init__(self, spec: NormSpec, source: Source, prefix: str, width: int) -> None:
        super().__init__(spec, source, prefix, width)
        self._weight = self._weight.float()
        self._bias = source.tensor(f"{prefix}{spec.name}.bias", (width,)).float() if spec.bias else None

    def __call__(self, x: Tensor) -> Tensor:
        # In float32, rounded once.
        return F.layer_norm(x.float(), self._weight.shape, self._weight, self._bias, self._eps).to(x.dtype)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        residual = residual.add_(x)
        return self(residual), residual


class NoNorm(Norm):
    """Stands where a family has no norm: only the residual addition is left."""

    def __init__(self) -> None:
        pass

    def __call__(self, x: Tensor) -> Tensor:
        return x

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        residual = residual.add_(x)
        return residual, residual

"""The norms of a layer: plain callables over their weight. Run by the executor's thread."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.models.mixers import NormSpec
from engine.models.parts.source import Source
from engine.ops.linear import Product, computed
from engine.ops.norm import Normed, add_layer_norm, add_rms_norm, layer_norm, rms_norm
from engine.ops.reordered import permuted


def make_norm(spec: NormSpec, source: Source, prefix: str, width: int) -> Norm:
    """The one that `spec` describes. prefix: of its tensors."""
    return (CenteredNorm if spec.centered else Norm)(spec, source, prefix, width)


class Norm:
    """RMS norm over the last dimension: x / sqrt(mean(x^2) + eps) * (offset + weight).

    With an offset the weight is kept in float32: 1 + weight would lose the weight's low bits in 16.
    """

    def __init__(self, spec: NormSpec, source: Source, prefix: str, width: int) -> None:
        self.eps = spec.eps
        if spec.weightless:
            self.weight = torch.ones(width, dtype=source.dtype, device=source.device)
        else:
            self.weight = source.tensor(f"{prefix}{spec.name}.weight", (width,))
        if spec.offset:
            self.weight = self.weight.float() + spec.offset

    def __call__(self, x: Tensor | Product) -> Tensor:
        """[N, width] -> [N, width]."""
        return rms_norm(computed(x), self.weight, self.eps)

    def later(self, x: Tensor) -> Tensor | Normed:
        """The same, for a product to take."""
        return Normed(x, self.weight, self.eps)

    def add(self, x: Tensor | Product, residual: Tensor) -> tuple[Tensor | Normed, Tensor]:
        """x and residual [N, width] -> (norm of their sum, their sum). The sum takes the residual's memory."""
        if isinstance(x, Product):
            residual = x.add_to(residual)
            return self.later(residual), residual
        return add_rms_norm(x, residual, self.weight, self.eps)


class CenteredNorm(Norm):
    """LayerNorm: x less its mean, over its standard deviation, times the weight, and the bias where there is one."""

    def __init__(self, spec: NormSpec, source: Source, prefix: str, width: int) -> None:
        super().__init__(spec, source, prefix, width)
        self.weight = self.weight.float()
        self.bias = source.tensor(f"{prefix}{spec.name}.bias", (width,)).float() if spec.bias else None

    def __call__(self, x: Tensor | Product) -> Tensor:
        return layer_norm(computed(x), self.weight, self.bias, self.eps)

    def later(self, x: Tensor) -> Tensor:
        return self(x)

    def add(self, x: Tensor | Product, residual: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(x, Product):
            residual = x.add_to(residual)
            return self(residual), residual
        return add_layer_norm(x, residual, self.weight, self.bias, self.eps)


class OwnNorms(Norm):
    """LayerNorm over each head, with a weight for each, without a bias. `{}` in its name is the head's number, where
    the checkpoint has a tensor for each. order: of the dimensions of a head in what is normed."""

    def __init__(
        self, spec: NormSpec, source: Source, prefix: str, heads: int, dim: int, order: Tensor | None = None
    ) -> None:
        self.eps = spec.eps
        name = f"{prefix}{spec.name}.weight"
        if "{}" in name:
            rows = [source.tensor(name.format(head), (dim,)) for head in range(heads)]
            weight = torch.stack(rows)
        else:
            weight = source.tensor(name, (heads, dim))
        self.weight = weight.float() if order is None else permuted(weight.float(), order, 1)

    def __call__(self, x: Tensor | Product) -> Tensor:
        """[N, heads * dim] -> the same."""
        x = computed(x)
        wide = x.float().unflatten(1, self.weight.shape)
        normed = F.layer_norm(wide, self.weight.shape[1:], eps=self.eps) * self.weight
        return normed.flatten(1).to(x.dtype)


class NoNorm(Norm):
    """Stands where a family has no norm: only the residual addition is left."""

    def __init__(self) -> None:
        pass

    def __call__(self, x: Tensor | Product) -> Tensor:
        return computed(x)

    def later(self, x: Tensor) -> Tensor:
        return x

    def add(self, x: Tensor | Product, residual: Tensor) -> tuple[Tensor, Tensor]:
        residual = x.add_to(residual) if isinstance(x, Product) else residual.add_(x)
        return residual, residual

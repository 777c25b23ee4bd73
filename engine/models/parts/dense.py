"""The feed-forward of a layer that all tokens share. Run by the executor's thread."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import NormalDist

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.models.parts.source import Source
from engine.models.spec import Dense, Ungated
from engine.ops.activation import GATED_ACTIVATIONS, PLAIN_ACTIVATIONS, xielu
from engine.ops.linear import Linear, Product
from engine.ops.norm import Normed, plain


def make_mlp(
    spec: Dense | Ungated, source: Source, prefix: str, hidden_size: int
) -> Callable[[Tensor | Normed], Tensor | Product]:
    """The one that `spec` describes. prefix: of its tensors."""
    if isinstance(spec, Ungated):
        return UngatedMlp(spec, source, prefix, hidden_size)
    return Mlp(spec, source, prefix, hidden_size)


class Mlp:
    """down(act(gate(x)) * up(x)), gate and up in one product."""

    def __init__(self, spec: Dense, source: Source, prefix: str, hidden_size: int) -> None:
        inner = spec.intermediate_size
        self._gate_up: Linear = source.linear(
            [prefix + name for name in spec.gate_up],
            [inner, inner] if len(spec.gate_up) == 2 else [2 * inner],
            hidden_size,
            bias=spec.bias,
            order=torch.arange(2 * inner).roll(inner) if spec.up_first else None,
            activation=None if spec.sparsity else spec.activation,
        )
        bias = spec.bias or spec.down_bias
        self._down: Linear = source.linear([prefix + spec.down], [hidden_size], inner, bias=bias)
        self._scales = (spec.gate_scale, spec.down_scale) if (spec.gate_scale, spec.down_scale) != (1.0, 1.0) else None
        self._bound = NormalDist().inv_cdf(spec.sparsity) if spec.sparsity else None
        self._activate = GATED_ACTIVATIONS[spec.activation]

    def __call__(self, x: Tensor | Normed) -> Tensor | Product:
        """[N, hidden] -> [N, hidden]."""
        if self._bound is not None:
            gate, up = self._gate_up(x).chunk(2, dim=1)
            return self._down.later(self._activate(torch.cat((above(gate, self._bound), up), 1)))
        if self._scales is None:
            return self._down.later(self._gate_up.gated(x))
        gate_scale, down_scale = self._scales
        gate_up = self._gate_up(plain(x))
        gate_up[:, : gate_up.shape[1] // 2] *= gate_scale
        return self._down(self._activate(gate_up)) * down_scale


def above(x: Tensor, bound: float) -> Tensor:
    """[N, W] -> how far each value is above its row's mean plus `bound` deviations, 0 where it is not."""
    wide = x.float()
    centered = wide - wide.mean(dim=1, keepdim=True)
    deviation = centered.square().mean(dim=1, keepdim=True).sqrt()
    return (centered - deviation * bound).relu_().to(x.dtype)


class UngatedMlp:
    """down(act(up(x)))."""

    def __init__(self, spec: Ungated, source: Source, prefix: str, hidden_size: int) -> None:
        inner = spec.intermediate_size
        self._activation: Callable[[Tensor], Tensor]
        if spec.activation == "xielu":
            names = [f"{prefix}mlp.act_fn.{name}" for name in ("alpha_p", "alpha_n")]
            above, below = (F.softplus(source.tensor(name, (1,), torch.float32)) for name in names)
            self._activation = partial(xielu, above=above, below=0.5 + below)
        else:
            self._activation = PLAIN_ACTIVATIONS[spec.activation]
        self._up: Linear = source.linear([prefix + spec.up], [inner], hidden_size, bias=spec.bias)
        self._down: Linear = source.linear([prefix + spec.down], [hidden_size], inner, bias=spec.bias)
        self.products = self._up, self._down

    def __call__(self, x: Tensor | Normed) -> Tensor | Product:
        """[N, hidden] -> [N, hidden]."""
        return self._down.later(self._activation(self._up(x)))

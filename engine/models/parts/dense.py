"""The feed-forward of a layer that all tokens share. Run by the executor's thread."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.models.parts.source import Source
from engine.models.spec import Dense, Ungated
from engine.ops.activation import PLAIN_ACTIVATIONS
from engine.ops.linear import Linear, Product
from engine.ops.norm import Normed


class Mlp:
    """down(act(gate(x)) * up(x)), gate and up in one product."""

    def __init__(self, spec: Dense, source: Source, prefix: str, hidden_size: int) -> None:
        inner = spec.intermediate_size
        self._gate_up: Linear = source.linear(
            [prefix + name for name in spec.gate_up],
            [inner, inner] if len(spec.gate_up) == 2 else [2 * inner],
            hidden_size,
            bias=spec.bias,
            activation=spec.activation,
        )
        self._down: Linear = source.linear([prefix + spec.down], [hidden_size], inner, bias=spec.bias)

    def __call__(self, x: Tensor | Normed) -> Tensor | Product:
        """[N, hidden] -> [N, hidden]."""
        return self._down.later(self._gate_up.gated(x))


class Xielu:
    """xIELU (arXiv 2411.13010): quadratic above 0, exponential below, of learned size. prefix: of its tensors."""

    def __init__(self, source: Source, prefix: str) -> None:
        above, below = (source.tensor(prefix + name, (1,), torch.float32) for name in ("alpha_p", "alpha_n"))
        self._above, self._below = F.softplus(above), 0.5 + F.softplus(below)

    def __call__(self, x: Tensor) -> Tensor:
        """In float32, rounded once."""
        wide = x.float()
        above = self._above * wide * wide
        below = (torch.expm1(wide.clamp_max(-1e-6)) - wide) * self._below
        return (torch.where(wide > 0, above, below) + 0.5 * wide).to(x.dtype)


class UngatedMlp:
    """down(act(up(x)))."""

    def __init__(self, spec: Ungated, source: Source, prefix: str, hidden_size: int) -> None:
        inner = spec.intermediate_size
        self._activation: Callable[[Tensor], Tensor]
        if spec.activation == "xielu":
            self._activation = Xielu(source, f"{prefix}mlp.act_fn.")
        else:
            self._activation = PLAIN_ACTIVATIONS[spec.activation]
        self._up: Linear = source.linear([prefix + spec.up], [inner], hidden_size, bias=spec.bias)
        self._down: Linear = source.linear([prefix + spec.down], [hidden_size], inner, bias=spec.bias)

    def __call__(self, x: Tensor | Normed) -> Tensor | Product:
        """[N, hidden] -> [N, hidden]."""
        return self._down.later(self._activation(self._up(x)))

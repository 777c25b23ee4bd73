"""Heads that make numbers of a text's vector: classifiers, and the Dense modules of sentence-transformers.

Few rows go through them, so all is done in float32. Built at start by the decoder, run by the executor's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.models.parts.source import Source
from engine.models.spec import Projection
from engine.ops.linear import Linear

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


class Head:
    """Projections, one after another."""

    def __init__(self, steps: Sequence[Projection], source: Source, width: int) -> None:
        self._steps: list[Callable[[Tensor], Tensor]] = []
        for step in steps:
            self._steps.append(_Step(step, source, width))
            width = step.size

    def __call__(self, x: Tensor) -> Tensor:
        """float32 [R, width] -> float32 [R, size of the last step]."""
        for step in self._steps:
            x = step(x)
        return x


class _Step:
    def __init__(self, spec: Projection, source: Source, width: int) -> None:
        self._activation = _ACTIVATIONS[spec.activation]
        self._linear: Linear | None = None
        if spec.name:
            self._linear = source.linear([spec.name], [spec.size], width, bias=spec.bias, dtype=torch.float32)
        self._norm: Tensor | None = None
        self._norm_bias: Tensor | None = None
        if spec.norm is not None:
            self._eps = spec.norm.eps
            self._norm = source.tensor(f"{spec.norm.name}.weight", (spec.size,), torch.float32)
            if spec.norm.bias:
                self._norm_bias = source.tensor(f"{spec.norm.name}.bias", (spec.size,), torch.float32)

    def __call__(self, x: Tensor) -> Tensor:
        if self._linear is not None:
            x = self._linear(x)
        x = self._activation(x)
        if self._norm is not None:
            x = F.layer_norm(x, self._norm.shape, self._norm, self._norm_bias, self._eps)
        return x

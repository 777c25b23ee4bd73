"""A linear layer that keeps its columns in another order than its input has them: those of one group side by side.

Made at load time for checkpoints whose groups of columns lie scattered (GPTQ's act-order); called by the executor's
thread.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.ops.linear import Linear
from engine.ops.norm import Normed, plain


def permuted(x: Tensor, order: Tensor, dim: int = 0) -> Tensor:
    """x.index_select(dim, order). A "meta" tensor is cut to that shape, all it has: torch would import operators
    for more (engine/later.py), half a second."""
    return x.narrow(dim, 0, len(order)) if x.device.type == "meta" else x.index_select(dim, order.to(x.device))


class ReorderedLinear(Linear):
    """inner: made of columns `order`, int64 [in_features], of the weight."""

    def __init__(self, inner: Linear, order: Tensor) -> None:
        super().__init__(torch.empty(1, 1), None, inner.activation)
        self.out_features, self.in_features, self.dtype = inner.out_features, inner.in_features, inner.dtype
        self.kind, self.has_bias = inner.kind, inner.has_bias
        self.inner = inner
        self._order = order
        self._back = order.argsort()

    @property
    def device(self) -> torch.device:
        """See Linear.device."""
        return self.inner.device

    def prepare(self, *, keep_rows: bool = False, kind: str | None = None, deterministic: bool = False) -> None:
        """Nothing is left to do."""

    def __call__(self, x: Tensor | Normed) -> Tensor:
        """[T, in_features] -> [T, out_features] of the same dtype."""
        return self.inner(plain(x)[:, self._order])

    def rows(self, ids: Tensor) -> Tensor:
        """See Linear.rows."""
        return self.inner.rows(ids)[:, self._back]

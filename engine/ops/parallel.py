"""Layers of which each rank of a group has a part: by columns, with products added up, and by rows of the vocabulary.

Made at load time (models/loading/slices.py), called by the executor's thread of every rank, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from engine.ops.linear import Linear
from engine.ops.lora import AdaptedLinear
from engine.ops.norm import Normed, plain
from engine.ops.ranks import Ranks

# Rows of the vocabulary are divided in multiples of this, where there are enough: whole panels of the kernels' weights.
VOCABULARY_STEP = 64


def share_of(count: int, rank: int, size: int) -> tuple[int, int]:
    """Rows [first, last) of a vocabulary that a rank has; the last one's may be fewer, or none."""
    each = -(-count // size)
    whole = -(-each // VOCABULARY_STEP) * VOCABULARY_STEP
    if whole * (size - 1) < count:
        each = whole
    return min(rank * each, count), min((rank + 1) * each, count)


class Summing(Protocol):
    """Where products are added up over the ranks; Ranks is one such."""

    def sum(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """See Ranks.sum."""
        ...


class _Shared(Linear):
    """Stands for a whole layer; `own` is this rank's part."""

    def __init__(self, own: Linear, out_features: int) -> None:
        super().__init__(torch.empty(1, 1), None, own.activation)
        self.own = own
        self.kind, self.dtype, self.has_bias = own.kind, own.dtype, own.has_bias
        self.out_features, self.in_features = out_features, own.in_features

    def prepare(self, *, keep_rows: bool = False, kind: str | None = None, deterministic: bool = False) -> None:
        """Nothing is left to do."""


class SummedLinear(_Shared):
    """own: made of some columns of the weight. bias: float32 [out_features], or None."""

    def __init__(self, own: Linear, bias: Tensor | None, ranks: Summing) -> None:
        super().__init__(own, own.out_features)
        self._ranks = ranks
        self._sum_bias = bias

    def __call__(self, x: Tensor | Normed) -> Tensor:
        """[T, columns of this rank] -> [T, out_features], the same in every rank."""
        return self._ranks.sum(self.own(x), self._sum_bias)


class SharedEmbedding(_Shared):
    """own: `rows` from `first` on of a table of `count` rows."""

    def __init__(self, own: Linear, first: int, count: int, sums: Summing) -> None:
        super().__init__(own, count)
        self._sums = sums
        self._first = first

    def rows(self, ids: Tensor) -> Tensor:
        """See Linear.rows. One rank has the row, the others nothing: no bit changes."""
        # What one rank alone would say of it; the native kernel reads foreign memory otherwise.
        assert len(ids) == 0 or (int(ids.min()) >= 0 and int(ids.max()) < self.out_features), "token id out of range"
        own = ids - self._first
        foreign = (own < 0) | (own >= self.own.out_features)
        found = self.own.rows(own.masked_fill(foreign, 0))
        return self._sums.sum(found.masked_fill_(foreign[:, None], 0.0))


# Rank 0: hidden states [R, hidden], for which all ranks are to compute their part of logits.
Ask = Callable[[Tensor], None]


class SharedOutput(SharedEmbedding):
    """The layer that makes logits. Rank 0 calls it, and `ask`s the others for their parts (`answer`)."""

    def __init__(self, own: Linear, first: int, count: int, ranks: Ranks, ask: Ask) -> None:
        super().__init__(own, first, count, ranks)
        self._ranks = ranks
        self._ask = ask
        shares = [share_of(count, rank, ranks.size) for rank in range(ranks.size)]
        self._counts = [last - begin for begin, last in shares]
        assert shares[ranks.rank] == (first, first + own.out_features)
        # Both what is asked and what is answered must have room.
        most = ranks.layout.logits // (self._counts[0] * own.dtype.itemsize)
        # With a hidden state goes whose it is.
        self._most = max(1, min(most, ranks.layout.message // (own.in_features * own.dtype.itemsize + 4) - 1))
        product = own.product if isinstance(own, AdaptedLinear) else None
        self._adapters = None if product is None else product.rows

    def __call__(self, x: Tensor | Normed) -> Tensor:
        """[R, in_features] -> [R, out_features] of the same dtype, in rank 0."""
        x = plain(x)
        out = torch.empty((x.shape[0], self.out_features), dtype=x.dtype)
        whose = 0 if self._adapters is None else self._adapters.ids
        for begin in range(0, x.shape[0], self._most):
            if self._adapters is not None and not isinstance(whose, int):
                self._adapters.use(whose[begin : begin + self._most])
            piece = x[begin : begin + self._most].contiguous()
            self._ask(piece)
            parts = out[begin : begin + self._most].split_with_sizes(self._counts, 1)
            parts[0].copy_(self.own(piece))
            self._ranks.arrive()
            self._ranks.meet()
            for rank in range(1, self._ranks.size):
                parts[rank].copy_(self._section(rank, len(piece)))
        if self._adapters is not None:
            self._adapters.use(whose)
        return out

    def answer(self, x: Tensor) -> None:
        """In the other ranks: what rank 0 asked for."""
        own = self.own(x)
        self._section(self._ranks.rank, len(x)).copy_(own)
        self._ranks.arrive()
        # Nobody begins the next sum while another is in the one before.
        self._ranks.meet()

    def _section(self, rank: int, rows: int) -> Tensor:
        count = self._counts[rank]
        section: np.ndarray = self._ranks.section(rank)[: rows * count * self.dtype.itemsize]
        return torch.from_numpy(section).view(self.dtype).view(rows, count)


class ParallelGroup:
    """A slices.Group: what the loading thread makes layers of."""

    def __init__(self, ranks: Ranks, ask: Ask, *, expert_parallel: bool = False) -> None:
        self.rank, self.size, self.expert_parallel = ranks.rank, ranks.size, expert_parallel
        self._ranks = ranks
        self._ask = ask
        # Of the model that was read last.
        self.output: SharedOutput | None = None

    def summed(self, linear: Linear, bias: Tensor | None) -> Linear:
        """See slices.Group."""
        return SummedLinear(linear, bias, self._ranks)

    def sum(self, x: Tensor) -> Tensor:
        """See slices.Group."""
        return self._ranks.sum(x)

    def embedding(self, own: Linear, first: int, count: int) -> Linear:
        """See slices.Group."""
        return SharedEmbedding(own, first, count, self._ranks)

    def output_layer(self, own: Linear, first: int, count: int) -> Linear:
        """See slices.Group."""
        self.output = SharedOutput(own, first, count, self._ranks, self._ask)
        return self.output

"""Layers of which each rank of a group of GPUs has a part; see parallel.py, whose counterpart on devices this is.

Parts are gathered and added up in the order of the ranks by an operation of this process, for what a library's
reduction adds depends on how many there are: a ring of three and more gives an element other bits in another batch.
Called on the compute stream, in every rank in the same order; nothing here waits on the host, and all can be captured.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ops.linear import Linear
from engine.ops.norm import Normed
from engine.ops.parallel import SharedEmbedding, SummedLinear, share_of
from engine.ops.triton.runtime import on_gpu

# Of one rank's part of a sum: up to here everybody gathers all parts, which is one hop; above, each adds up its share
# of the rows, which halves what four ranks move, and more with more. The bits are the same.
GATHER_BYTES = 1 << 19


class Collectives(Protocol):
    """What is asked of a communication library: copies, no arithmetic. On the current stream, of contiguous tensors."""

    rank: int
    size: int

    def gather(self, out: Tensor, x: Tensor) -> None:
        """out [size, *x.shape]: every rank's x."""
        ...

    def exchange(self, out: Tensor, x: Tensor) -> None:
        """x [size, n]: row r goes to rank r. out [size, n]: what each rank had for this one."""
        ...


def add_up(parts: Tensor, bias: Tensor | None = None) -> Tensor:
    """parts [ranks, T, C], bias float32 [C] or None -> [T, C]: in float32, in the order of the ranks, rounded once."""
    if on_gpu(parts):
        from engine.ops.triton import ranks as kernels

        return kernels.add_up(parts, bias)
    return torch_add_up(parts, bias)


def torch_add_up(parts: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same by torch."""
    total = parts[0].float() + parts[1].float()
    for rank in range(2, parts.shape[0]):
        total = total + parts[rank].float()
    if bias is not None:
        total = total + bias
    return total.to(parts.dtype)


class Sums:
    """What parallel.py's layers know of ranks, by collectives of a device."""

    def __init__(self, collectives: Collectives) -> None:
        self.collectives = collectives
        self.rank, self.size = collectives.rank, collectives.size

    def sum(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """What all ranks have in x [T, C], added up in their order, and bias (float32 [C]): a new tensor, [T, C]."""
        size, rows = self.size, x.shape[0]
        if size == 2 or x.nbytes <= GATHER_BYTES:
            parts = x.new_empty((size, *x.shape))
            self.collectives.gather(parts, x.contiguous())
            return add_up(parts, bias)
        if rows % size:
            x = F.pad(x, (0, 0, 0, size - rows % size))
        shares = x.contiguous().view(size, -1)
        parts, total = torch.empty_like(shares), torch.empty_like(shares)
        self.collectives.exchange(parts, shares)
        own = add_up(parts.view(size, -1, x.shape[1]), bias)
        self.collectives.gather(total, own.view(-1))
        return total.view(x.shape)[:rows]


class DeviceEmbedding(SharedEmbedding):
    """See SharedEmbedding. The host knows no id, and so checks none: the scheduler's come from requests that were."""

    def rows(self, ids: Tensor) -> Tensor:
        """See Linear.rows. One rank has the row, the others zeros: no bit changes."""
        own = ids - self._first
        foreign = (own < 0) | (own >= self.own.out_features)
        found = self.own.rows(own.masked_fill(foreign, 0))
        return self._sums.sum(found.masked_fill(foreign[:, None], 0.0))


class DeviceOutput(DeviceEmbedding):
    """The layer that makes logits: every rank calls it, and has all of them."""

    def __init__(self, own: Linear, first: int, count: int, sums: Sums) -> None:
        super().__init__(own, first, count, sums)
        shares = [share_of(count, rank, sums.size) for rank in range(sums.size)]
        assert shares[sums.rank] == (first, first + own.out_features)
        self._group, self._each = sums, shares[0][1]
        self._counts = [last - begin for begin, last in shares]

    def __call__(self, x: Tensor | Normed) -> Tensor:
        """[R, in_features] -> [R, out_features] of the same dtype, the same in every rank."""
        own = self.own(x)
        if own.shape[1] < self._each:  # of the last ranks
            own = F.pad(own, (0, self._each - own.shape[1]))
        parts = own.new_empty((self._group.size, *own.shape))
        self._group.collectives.gather(parts, own.contiguous())
        return torch.cat([parts[rank, :, :count] for rank, count in enumerate(self._counts)], 1)


class DeviceGroup:
    """A slices.Group on a device: what the loading thread makes layers of."""

    def __init__(self, collectives: Collectives, *, expert_parallel: bool = False) -> None:
        self.rank, self.size, self.expert_parallel = collectives.rank, collectives.size, expert_parallel
        self._sums = Sums(collectives)

    def summed(self, linear: Linear, bias: Tensor | None) -> Linear:
        """See slices.Group."""
        return SummedLinear(linear, bias, self._sums)

    def sum(self, x: Tensor) -> Tensor:
        """See slices.Group."""
        return self._sums.sum(x)

    def taken_of_first(self, x: Tensor) -> Tensor:
        """Rank 0's x, of one shape in all: a new tensor."""
        every = x.new_empty((self.size, *x.shape))
        self._sums.collectives.gather(every, x.contiguous())
        return every[0]

    def embedding(self, own: Linear, first: int, count: int) -> Linear:
        """See slices.Group."""
        return DeviceEmbedding(own, first, count, self._sums)

    def output_layer(self, own: Linear, first: int, count: int) -> Linear:
        """See slices.Group."""
        return DeviceOutput(own, first, count, self._sums)

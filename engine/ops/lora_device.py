"""LoRA adapters at a GPU's linear layers: y += B (A x), each row by its own adapter; rows of none are not touched.

All adapters lie in one tensor by their index, the matrices of each one behind another with the ranks that they have,
and a table on the device says where. So a graph serves whatever adapters are in place when it is replayed. Two launches
a layer (triton/lora.py); `torch_add` is the reference. Filled by executor/cuda_adapters.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.ops.lora import Branch, Int32Array
from engine.ops.triton.runtime import on_gpu

# Rows of one adapter that a program computes; ranks are multiples of UNIT, and places of matrices are counted in it.
ROWS, UNIT = 32, 16
# Where a block has no row.
NO_ROW = 2**31 - 1
# Outputs of one program.
BLOCK_N = 128


class Grouped(NamedTuple):
    """Whose each row is. order int32 [blocks * ROWS]: rows by adapter, NO_ROW where a block has room left. owners int32
    [blocks]: the index of the adapter of each block, -1 for nobody's."""

    order: Tensor
    owners: Tensor


def num_blocks(rows: int, capacity: int) -> int:
    """Blocks that any split of so many rows among so many adapters fits into."""
    return rows // ROWS + min(rows, capacity)


def group(ids: Int32Array, order: Int32Array, owners: Int32Array) -> None:
    """Write a Grouped of rows whose adapters are `ids`, 0 for none, into arrays of enough blocks."""
    order[:], owners[:] = NO_ROW, -1
    rows = np.flatnonzero(ids)
    rows = rows[np.argsort(ids[rows], kind="stable")]
    found, firsts, counts = np.unique(ids[rows], return_index=True, return_counts=True)
    blocks = -(-counts // ROWS)
    owners[: blocks.sum()] = np.repeat(found, blocks)
    begins = (np.cumsum(blocks) - blocks) * ROWS
    order[np.repeat(begins - firsts, counts) + np.arange(len(rows))] = rows


@dataclass(frozen=True, slots=True)
class SiteShape:
    """A layer that adapters change. parts: outputs [first, end) with factors of their own, of at most `rank` ranks."""

    in_features: int
    out_features: int
    parts: tuple[tuple[int, int], ...]
    rank: int

    def size(self, rank: int) -> int:
        """Numbers of A and B: [parts * rank, in] and [rank, out], the latter on a multiple of UNIT."""
        return _aligned(len(self.parts) * rank * self.in_features) + _aligned(rank * self.out_features)


def _aligned(count: int) -> int:
    return -(-count // UNIT) * UNIT


def pack(shape: SiteShape, branch: Branch) -> tuple[int, Tensor]:
    """rank, and float32 [shape.size(rank)] of what an adapter adds there. What a part has no use for is left out.

    ValueError where it has more than there is room for.
    """
    parts = []
    for first, end in shape.parts:
        downs, ups = [], []
        for begin, down, up in branch.matrices():
            low, high = max(first, begin), min(end, begin + len(up))
            if low < high:
                own = torch.zeros((end - first, len(down)))
                own[low - first : high - first] = up[low - begin : high - begin]
                kept = own.any(0).nonzero().flatten()
                downs.append(down[kept])
                ups.append(own[:, kept])
        down, up = (torch.cat(downs), torch.cat(ups, 1)) if downs else (torch.empty(0, 1), torch.empty(end - first, 0))
        parts.append((down, up))
    rank = _aligned(max(len(down) for down, _ in parts))
    if rank > _aligned(shape.rank):
        raise ValueError(f"{rank} ranks of one layer, and there is room for {_aligned(shape.rank)}")
    data = torch.zeros(shape.size(rank))
    inside = len(parts) * rank * shape.in_features
    downs_of = data[:inside].view(len(parts), rank, shape.in_features)
    at = _aligned(inside)
    up_of = data[at : at + rank * shape.out_features].view(rank, shape.out_features)
    for (first, end), own, (down, up) in zip(shape.parts, downs_of, parts, strict=True):
        if len(down):
            own[: len(down)] = down
            up_of[: len(down), first:end] = up.T
    return rank, data


class Shelf:
    """All adapters on the device. memory [capacity, room], in the model's dtype; table int32 [capacity + 1, sites, 2]:
    by index and site where its matrices begin in its row of memory, in UNITs, and their rank, 0 where it has none."""

    def __init__(self, shapes: Sequence[SiteShape], capacity: int, dtype: torch.dtype) -> None:
        self.shapes, self.capacity, self.dtype = tuple(shapes), capacity, dtype
        self.room = sum(shape.size(_aligned(shape.rank)) for shape in shapes)
        assert self.room // UNIT < 2**31
        self.memory = torch.empty(0, dtype=dtype)
        self.table = torch.empty(0, dtype=torch.int32)

    @property
    def num_bytes(self) -> int:
        return self.capacity * self.room * self.dtype.itemsize

    def pack(self, branches: Mapping[int, Branch]) -> tuple[Tensor, Tensor]:
        """What an adapter has in a row of memory, in its dtype, and its entries of the table; by numbers of sites."""
        table, parts, used = torch.zeros((len(self.shapes), 2), dtype=torch.int32), [], 0
        for number, branch in branches.items():
            rank, data = pack(self.shapes[number], branch)
            table[number, 0], table[number, 1] = used // UNIT, rank
            parts.append(data.to(self.dtype))
            used += len(data)
        return torch.cat(parts), table.flatten()


class DeviceSite:
    """A layer's part in it. tiles int32 [n, 3] on the device: (part, first output, end), at most BLOCK_N outputs."""

    def __init__(self, shelf: Shelf, number: int, device: torch.device) -> None:
        self.shelf, self.number, self.shape = shelf, number, shelf.shapes[number]
        self.ranks = _aligned(self.shape.rank)
        tiles = [
            (part, begin, min(begin + BLOCK_N, end))
            for part, (first, end) in enumerate(self.shape.parts)
            for begin in range(first, end, BLOCK_N)
        ]
        self.tiles = torch.tensor(tiles, dtype=torch.int32).to(device)
        self.aligned = all(begin % UNIT == 0 for _, begin, _ in tiles) and self.shape.out_features % UNIT == 0

    def add(self, x: Tensor, y: Tensor, rows: Grouped) -> None:
        """x [T, in], and y [T, out] what the layer beneath made of it; in place."""
        if on_gpu(x):
            self.by_kernels(x, y, rows)
        else:
            torch_add(self, x, y, rows)

    def by_kernels(self, x: Tensor, y: Tensor, rows: Grouped, *, halves: bool | None = None) -> None:
        """The same. halves: for tests."""
        from engine.ops.triton import lora as kernels

        assert x.shape[1] == self.shape.in_features and y.shape[1] == self.shape.out_features
        kernels.add(
            x,
            y,
            self.shelf.memory,
            self.shelf.table,
            rows.order,
            rows.owners,
            self.tiles,
            number=self.number,
            parts=len(self.shape.parts),
            ranks=self.ranks,
            unit=UNIT,
            width=BLOCK_N,
            aligned=self.aligned,
            halves=halves,
        )


def torch_add(site: DeviceSite, x: Tensor, y: Tensor, rows: Grouped) -> None:
    """The same in torch: every row by every adapter, of which it takes its own."""
    shape, shelf, ranks, device = site.shape, site.shelf, site.ranks, x.device
    count, parts = len(x), len(shape.parts)
    owners = rows.owners[:, None].expand(-1, ROWS).reshape(-1)
    places = torch.where(owners > 0, rows.order.clamp(max=count), count).long()
    ids = torch.zeros(count + 1, dtype=torch.int32, device=device).scatter_(0, places, owners)[:count].long()
    entries = shelf.table[1:].view(shelf.capacity, -1, 2)[:, site.number].long()
    begin, rank = (entries[:, each].view(-1, 1, 1) for each in range(2))
    number, part = torch.arange(parts * ranks, device=device) % ranks, torch.arange(parts, device=device)
    lines = part.repeat_interleave(ranks) * rank[:, 0] + number
    columns, outputs = (torch.arange(n, device=device) for n in (shape.in_features, shape.out_features))

    def matrix(at: Tensor, numbers: Tensor) -> Tensor:
        """[capacity, len(numbers), width]; zeros of ranks that there are not."""
        kept = numbers[:, None] < rank
        found = shelf.memory.gather(1, torch.where(kept, at, 0).flatten(1)).view(at.shape)
        return torch.where(kept, found.float(), 0.0)

    down = matrix(begin * UNIT + lines[:, :, None] * shape.in_features + columns, number)
    behind = (parts * rank * shape.in_features + UNIT - 1) // UNIT
    own = number[:ranks]
    up = matrix((begin + behind) * UNIT + own[:, None] * shape.out_features + outputs, own)
    inner = (x.float() @ down.transpose(1, 2)).view(shelf.capacity, count, parts, ranks)
    added = torch.empty((shelf.capacity, count, shape.out_features), device=device)
    for number_of, (first, end) in enumerate(shape.parts):
        added[:, :, first:end] = inner[:, :, number_of] @ up[:, :, first:end]
    index = (ids - 1).clamp(min=0)
    mine = (ids > 0) & (rank.flatten()[index] > 0)
    mixed = y.float() + added[index, torch.arange(count, device=device)]
    y.copy_(torch.where(mine[:, None], mixed.to(y.dtype), y))

"""LoRA adapters at a GPU's layers: y += gain y + offset + B (A x), and outputs of an adapter's own; each row by its own
adapter, and rows of none are not touched.

All adapters lie in one tensor by their index, what each one has at its layers one behind another, with the ranks that
they have, and a table on the device says where. So a graph serves whatever adapters are in place when it is replayed.
Two launches a layer, one an embedding (triton/lora.py); `torch_add` and `torch_look_up` are the reference. Filled by
executor/cuda_adapters.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.ops.lora import Branch, Int32Array
from engine.ops.triton.runtime import on_gpu

# Rows of one adapter that a program computes; ranks are multiples of UNIT, and places of matrices are counted in it.
ROWS, UNIT = 32, 16
# Of a site in the table: where A begins, with B behind it, and their rank; where gain and offset lie; where outputs of
# its own do, and how many there are. Places are counted in UNITs, and 0 is none.
FIELDS = 5
# Where a block has no row.
NO_ROW = 2**31 - 1
# Outputs of one program, at most.
BLOCK_N = 128


Sort = Callable[[Tensor, int, int], tuple[Tensor, Tensor]]


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
    """A layer that adapters change. parts: outputs [first, end) with factors of their own, of at most `rank` ranks.
    is_table: an embedding, of as many tokens as it has inputs. replaced: adapters may have outputs of their own there,
    which costs a launch; an embedding's are looked up with the rest."""

    in_features: int
    out_features: int
    parts: tuple[tuple[int, int], ...]
    rank: int
    is_table: bool = False
    replaced: bool = False

    def size(self, rank: int) -> int:
        """Numbers of A and B: [parts * rank, in], or [in, rank] of an embedding, and [rank, out], the latter on a
        multiple of UNIT."""
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
            of_part = own.view(shape.in_features, rank).T if shape.is_table else own
            of_part[: len(down)] = down
            up_of[: len(down), first:end] = up.T
    return rank, data


class _Line:
    """A row of Shelf.memory while it is filled. The first UNIT is nobody's, so that a place is never 0."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.used, self.parts = dtype, UNIT, [torch.zeros(UNIT, dtype=dtype)]

    def put(self, values: Tensor, *, bits: bool = False) -> int:
        """Numbers, each rounded once; or words of 32 bits as they are. Returns where they lie."""
        place = self.used // UNIT
        flat = values.contiguous().flatten()
        flat = flat.view(self.dtype) if bits else flat.to(self.dtype)
        self.parts.append(torch.cat((flat, flat.new_zeros(-len(flat) % UNIT))))
        self.used += len(self.parts[-1])
        return place


def words_of(dtype: torch.dtype) -> int:
    """Numbers that a word of 32 bits takes the place of."""
    return 4 // dtype.itemsize


def _entry(line: _Line, shape: SiteShape, branch: Branch) -> list[int]:
    """FIELDS of what an adapter has at a site, which is put into its line. Raises ValueError as `pack`."""
    rank, data = pack(shape, branch)
    begin = line.put(data) if rank else 0
    beside = 0
    if branch.gain is not None or branch.offset is not None:
        nothing = torch.zeros(shape.out_features)
        both = [nothing if each is None else each for each in (branch.gain, branch.offset)]
        beside = line.put(torch.cat(both), bits=True)
    own = count = 0
    if branch.table_rows is not None:
        # In the order of token ids; as many as there are tokens are all of them.
        listed = branch.table or {token: token for token in range(shape.in_features)}
        tokens = torch.tensor(sorted(listed), dtype=torch.int32)
        own, count = line.put(tokens, bits=True), len(tokens)
        line.put(branch.table_rows[[listed[token] for token in tokens.tolist()]])
    elif branch.replaced:
        assert shape.replaced
        parts = [each.numbers() for each in branch.replaced]
        columns = torch.cat([each.columns for each in branch.replaced]).int()
        own, count = line.put(columns, bits=True), len(columns)
        line.put(torch.cat([bias for _, bias in parts]), bits=True)
        line.put(torch.cat([weight for weight, _ in parts]))
    return [begin, rank, beside, own, count]


class Shelf:
    """All adapters on the device. memory [capacity, room], in the model's dtype; table int32 [capacity + 1, sites *
    FIELDS]: by index and site what it has there.

    room: numbers of an adapter; where it is not said, as many as all these layers take at their highest rank.
    """

    def __init__(self, shapes: Sequence[SiteShape], capacity: int, dtype: torch.dtype, room: int | None = None) -> None:
        self.shapes, self.capacity, self.dtype = tuple(shapes), capacity, dtype
        self.room = room_of(self.shapes, dtype) if room is None else _aligned(room)
        assert self.room // UNIT < 2**31
        self.memory = torch.empty(0, dtype=dtype)
        self.table = torch.empty(0, dtype=torch.int32)

    @property
    def num_bytes(self) -> int:
        return self.capacity * self.room * self.dtype.itemsize

    def pack(self, branches: Mapping[int, Branch]) -> tuple[Tensor, Tensor]:
        """What an adapter has in a row of memory, in its dtype, and its entries of the table; by numbers of sites.
        Raises ValueError where it does not fit."""
        table, line = torch.zeros((len(self.shapes), FIELDS), dtype=torch.int32), _Line(self.dtype)
        for number, branch in branches.items():
            table[number] = torch.tensor(_entry(line, self.shapes[number], branch), dtype=torch.int32)
            if line.used > self.room:
                mib = self.room * self.dtype.itemsize / 2**20
                raise ValueError(f"it takes more than the {mib:.1f} MiB that the GPU has for each (--max-lora-mib)")
        return torch.cat(line.parts), table.flatten()


def room_of(shapes: Iterable[SiteShape], dtype: torch.dtype) -> int:
    """Numbers of an adapter of all these layers, with factors of the highest rank, gains and offsets."""
    words = words_of(dtype)
    sizes = (shape.size(_aligned(shape.rank)) + _aligned(2 * words * shape.out_features) for shape in shapes)
    return UNIT + sum(sizes)


class DeviceSite:
    """A layer's part in it. tiles int32 [n, 3] on the device: (part, first output, end), at most BLOCK_N outputs."""

    def __init__(self, shelf: Shelf, number: int, device: torch.device) -> None:
        self.shelf, self.number, self.shape = shelf, number, shelf.shapes[number]
        self.ranks = _aligned(self.shape.rank)
        self.aligned = (
            all(n % UNIT == 0 for part in self.shape.parts for n in part) and self.shape.out_features % UNIT == 0
        )
        # Addresses that are no multiples of anything take registers.
        self.width = BLOCK_N if self.aligned else BLOCK_N // 2
        tiles = [
            (part, begin, min(begin + self.width, end))
            for part, (first, end) in enumerate(self.shape.parts)
            for begin in range(first, end, self.width)
        ]
        self.tiles = torch.tensor(tiles, dtype=torch.int32).to(device)

    def add(self, x: Tensor, y: Tensor, rows: Grouped) -> None:
        """x [T, in], and y [T, out] what the layer beneath made of it; in place."""
        if on_gpu(x):
            self.by_kernels(x, y, rows)
        else:
            torch_add(self, x, y, rows)

    def of_expert(self, number: int) -> DeviceSite:
        """That of another expert, where this is the first one's of a layer."""
        other = copy.copy(self)
        other.number += number
        return other

    def pairs_of(self, experts: Tensor, count: int, rows: Grouped, sort: Sort) -> Grouped:
        """Pairs of (token, expert), int32 [T, chosen] of `count` (-1: of none), by adapter and expert. owners: the
        adapter, from 0 on, times count and the expert, or -1. sort: (int32 [T, chosen], kinds, rows of a block) ->
        order, owners."""
        ids = _indices(rows, len(experts)).int()[:, None]
        kinds = torch.where((ids > 0) & (experts >= 0), (ids - 1) * count + experts, -1)
        return Grouped(*sort(kinds, self.shelf.capacity * count, ROWS))

    def add_pairs(self, x: Tensor, y: Tensor, pairs: Grouped, count: int, per_row: int) -> None:
        """`add` of `count` experts' layers, of which this is the first: y [pairs, out] of rows pair // per_row of x."""
        self.by_kernels(x, y, pairs, experts=count, per_row=per_row)

    def look_up(self, ids: Tensor, y: Tensor, rows: Grouped) -> None:
        """Token ids [T], and y [T, out] their rows of the layer's own table; in place."""
        if on_gpu(y):
            self.look_up_by_kernel(ids, y, rows)
        else:
            torch_look_up(self, ids, y, rows)

    def look_up_by_kernel(self, ids: Tensor, y: Tensor, rows: Grouped) -> None:
        """The same."""
        from engine.ops.triton import lora as kernels

        assert self.shape.is_table and y.shape[1] == self.shape.out_features
        kernels.look_up(
            ids,
            y,
            self.shelf.memory,
            self.shelf.table,
            rows.order,
            rows.owners,
            number=self.number,
            tokens=self.shape.in_features,
            fields=FIELDS,
            unit=UNIT,
            width=BLOCK_N // 2,
        )

    def by_kernels(
        self, x: Tensor, y: Tensor, rows: Grouped, *, halves: bool | None = None, experts: int = 0, per_row: int = 1
    ) -> None:
        """`add`, or `add_pairs` of so many experts. halves: for tests."""
        from engine.ops.triton import lora as kernels

        assert x.shape[1] == self.shape.in_features and y.shape[1] == self.shape.out_features
        if self.shape.replaced:
            kernels.replace(
                x,
                y,
                self.shelf.memory,
                self.shelf.table,
                rows.order,
                rows.owners,
                number=self.number,
                fields=FIELDS,
                unit=UNIT,
                width=BLOCK_N // 2,
            )
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
            fields=FIELDS,
            unit=UNIT,
            width=self.width,
            aligned=self.aligned,
            halves=halves,
            experts=experts,
            per_row=per_row,
        )


def _indices(rows: Grouped, count: int) -> Tensor:
    """int64 [count]: whose each row is, 0 for nobody's."""
    owners = rows.owners[:, None].expand(-1, ROWS).reshape(-1)
    places = torch.where(owners > 0, rows.order.clamp(max=count), count).long()
    ids = torch.zeros(count + 1, dtype=torch.int32, device=owners.device)
    return ids.scatter_(0, places, owners)[:count].long()


class _Entries:
    """What all adapters have at a site, [capacity, 1, 1] of each field, and what lies there."""

    def __init__(self, site: DeviceSite) -> None:
        self.shelf, self.shape = site.shelf, site.shape
        entries = self.shelf.table[1:].view(self.shelf.capacity, -1, FIELDS)[:, site.number].long()
        self.begin, self.rank, self.beside, self.own, self.count = entries.T[:, :, None, None]

    def read(self, at: Tensor, kept: Tensor, kind: torch.dtype | None = None) -> Tensor:
        """[capacity, n, m]: numbers of memory at these places, counted in `kind`, 0 where none are kept."""
        memory = self.shelf.memory if kind is None else self.shelf.memory.view(kind)
        places = torch.where(kept, at, 0)
        return torch.where(kept, memory.gather(1, places.flatten(1)).view(places.shape), 0)

    def vectors(self) -> Tensor:
        """float32 [capacity, 2, out]: gain and offset."""
        count = torch.arange(2 * self.shape.out_features, device=self.shelf.table.device)
        at = self.beside * UNIT // words_of(self.shelf.dtype) + count
        return self.read(at, self.beside > 0, torch.float32).view(self.shelf.capacity, 2, -1)

    def own_rows(self, most: int, vectors: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What lies before rows of its own, `vectors` of words: int32 [capacity, 1, most] and as float32 the last of
        them; the rows float32 [capacity, most, width]; and which of them there are, [capacity, 1, most]."""
        words, device = words_of(self.shelf.dtype), self.shelf.table.device
        number = torch.arange(most, device=device)
        kept, each = number < self.count, (self.count * words + UNIT - 1) // UNIT * UNIT
        first = self.read(self.own * UNIT // words + number, kept, torch.int32)
        last = self.read((self.own * UNIT + (vectors - 1) * each) // words + number, kept, torch.float32)
        at = self.own * UNIT + vectors * each + number[:, None] * width + torch.arange(width, device=device)
        return first, last, self.read(at, kept.transpose(1, 2)).float(), kept

    def up(self, ranks: int) -> Tensor:
        """float32 [capacity, ranks, out]."""
        shape, device = self.shape, self.shelf.table.device
        behind = (len(shape.parts) * self.rank * shape.in_features + UNIT - 1) // UNIT
        own, outputs = (torch.arange(n, device=device) for n in (ranks, shape.out_features))
        at = (self.begin + behind) * UNIT + own[:, None] * shape.out_features + outputs
        return self.read(at, own[:, None] < self.rank).float()


def torch_add(site: DeviceSite, x: Tensor, y: Tensor, rows: Grouped) -> None:
    """The same in torch: every row by every adapter, of which it takes its own."""
    shape, shelf, ranks, device = site.shape, site.shelf, site.ranks, x.device
    count, parts = len(x), len(shape.parts)
    has = _Entries(site)
    number, part = torch.arange(parts * ranks, device=device) % ranks, torch.arange(parts, device=device)
    lines = part.repeat_interleave(ranks) * has.rank[:, 0] + number
    columns = torch.arange(shape.in_features, device=device)
    at = has.begin * UNIT + lines[:, :, None] * shape.in_features + columns
    down, up = has.read(at, number[:, None] < has.rank).float(), has.up(ranks)
    inner = (x.float() @ down.transpose(1, 2)).view(shelf.capacity, count, parts, ranks)
    before = y.float().expand(shelf.capacity, -1, -1)
    if shape.replaced:
        columns, bias, weight, kept = has.own_rows(shape.out_features, 2, shape.in_features)
        made = x.float() @ weight.transpose(1, 2) + bias
        to = torch.where(kept, columns, shape.out_features).long().expand(-1, count, -1)
        wide = torch.cat((before, before[:, :, :1]), 2)
        before = wide.scatter(2, to, made)[:, :, : shape.out_features]
    gain, offset = has.vectors()[:, :, None].unbind(1)
    added = gain * before + offset
    for number_of, (first, end) in enumerate(shape.parts):
        added[:, :, first:end] += inner[:, :, number_of] @ up[:, :, first:end]
    _take(_indices(rows, count), (has.rank > 0) | (has.beside > 0) | (has.own > 0), before + added, y)


def torch_look_up(site: DeviceSite, ids: Tensor, y: Tensor, rows: Grouped) -> None:
    """An embedding's part in torch: every token by every adapter."""
    shape, shelf = site.shape, site.shelf
    has = _Entries(site)
    number = torch.arange(site.ranks, device=y.device)
    at = has.begin * UNIT + ids.long()[:, None] * has.rank + number
    inner = has.read(at, number < has.rank).float()
    tokens, _, own, kept = has.own_rows(shape.in_features, 1, shape.out_features)
    same = (ids[:, None] == tokens) & kept
    place = same.int().argmax(2)
    mine = own.gather(1, place[:, :, None].expand(-1, -1, shape.out_features))
    before = torch.where(same.any(2)[:, :, None], mine, y.float().expand(shelf.capacity, -1, -1))
    _take(_indices(rows, len(ids)), (has.rank > 0) | (has.own > 0), before + inner @ has.up(site.ranks), y)


def _take(ids: Tensor, has: Tensor, mixed: Tensor, y: Tensor) -> None:
    """Rows of `mixed` [capacity, T, out] by each one's index to y, where its adapter has anything."""
    index = (ids - 1).clamp(min=0)
    mine = (ids > 0) & has.flatten()[index]
    own = mixed[index, torch.arange(len(ids), device=ids.device)]
    y.copy_(torch.where(mine[:, None], own.to(y.dtype), y))

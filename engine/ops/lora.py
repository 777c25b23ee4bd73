"""LoRA adapters at linear layers: y += B (A x) in float32, for rows of many adapters and of none in one step.

An adapter's matrices are packed once, on any thread (Branch); the executor's thread puts them into layers and says
whose each row is (Rows), and the layers (AdaptedLinear) add what is theirs, by the kernels of kernels_lora.h or by
torch. A row has the same bits in any company; where no row has an adapter, the layer beneath runs as if alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.ops import native
from engine.ops.activation import GATED_ACTIVATIONS
from engine.ops.heads import HeadLinear
from engine.ops.linear import Linear, Product
from engine.ops.norm import Normed, plain

Int32Array = npt.NDArray[np.int32]

# LORA_WIDTH of kernels_lora.h.
WIDTH = 16


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """down float32 [rank, in], up float32 [out, rank], scaled: of the outputs [first, first + out) of a layer."""

    first: int
    down: Tensor
    up: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Replaced:
    """Outputs that an adapter has of its own: columns int64 [n] of y are what `linear` makes of x."""

    columns: Tensor
    linear: Linear

    def numbers(self) -> tuple[Tensor, Tensor]:
        """float32 [n, in], and its bias [n], 0 where there is none."""
        count = self.linear.out_features
        bias = self.linear._bias
        return self.linear.rows(torch.arange(count)).float(), torch.zeros(count) if bias is None else bias.float()


class Branch:
    """What one adapter does at one layer: y += gain y + offset + up (down x), and some outputs replaced.

    gain, offset: float32 [out] or None. order: as Source.linear has it; all the rest is in the checkpoint's order.
    looked_up: `down` is read by token id and not multiplied (an embedding); table: rows in place of the layer's own,
    by token id.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        factors: Sequence[Factors],
        *,
        gain: Tensor | None = None,
        offset: Tensor | None = None,
        order: Tensor | None = None,
        replaced: Sequence[Replaced] = (),
        looked_up: bool = False,
        table: dict[int, int] | None = None,
        table_rows: Tensor | None = None,
    ) -> None:
        self.gain, self.offset = _ordered(gain, order), _ordered(offset, order)
        self.replaced = tuple(replaced)
        self.table, self.table_rows = table, table_rows
        blocks = _blocks(out_features, factors, order, everywhere=gain is not None or offset is not None)
        ranks = sum(len(each.down) for each in factors)
        self.ranks = -(-ranks // WIDTH) * WIDTH
        self._ups = [_panels(up) for _, _, up in blocks]
        self._places = [(first, up.shape[0], rank_first) for first, rank_first, up in blocks]
        self.looked_up = looked_up
        self._down: Tensor | None = None
        if factors:
            down = torch.cat([each.down for each in factors])
            down = torch.cat((down, down.new_zeros(self.ranks - ranks, down.shape[1])))
            self._down = down.T.contiguous() if looked_up else down.view(-1, WIDTH, in_features).transpose(1, 2)
            self._down = self._down.contiguous()
        self._blocks = torch.tensor(
            [
                [first, width, rank_first, up.shape[1], up.data_ptr()]
                for (first, width, rank_first), up in zip(self._places, self._ups, strict=True)
            ],
            dtype=torch.int64,
        )
        address = [0 if each is None else each.data_ptr() for each in (self._down, self.gain, self.offset)]
        self._struct = torch.tensor(
            [0 if looked_up else address[0], self.ranks, len(blocks), self._blocks.data_ptr(), *address[1:]],
            dtype=torch.int64,
        )

    @property
    def address(self) -> int:
        """Of its LoraBranch."""
        return self._struct.data_ptr()

    @property
    def num_bytes(self) -> int:
        parts = [self._down, self.gain, self.offset, self.table_rows, *self._ups]
        own = sum(each.nbytes for each in parts if each is not None)
        return own + sum(each.linear.out_features * each.linear.in_features * 4 for each in self.replaced)

    def matrices(self) -> list[tuple[int, Tensor, Tensor]]:
        """(first output, down [rank, in], up [n, rank]), as they were given or split otherwise."""
        if self._down is None:
            return []
        down = self._down.T if self.looked_up else self._down.transpose(1, 2).flatten(0, 1)
        found = []
        for (first, width, rank_first), up in zip(self._places, self._ups, strict=True):
            ranks = up.shape[1]
            if not ranks:  # a gain or an offset alone
                continue
            rows = up.transpose(1, 2).reshape(-1, ranks)[:width]
            found.append((first, down[rank_first : rank_first + ranks], rows))
        return found

    def inner_of(self, ids: Tensor) -> Tensor:
        """Of an embedding: float32 [T, ranks] for token ids."""
        assert self._down is not None
        return self._down[ids]

    def down(self, x: Tensor) -> Tensor:
        """Without the kernels: one row [in] -> float32 [ranks]."""
        if self._down is None:
            return x.new_zeros(self.ranks, dtype=torch.float32)
        return (self._down * x.float()[None, :, None]).sum(1).flatten()

    def up(self, y: Tensor, inner: Tensor) -> None:
        """Without the kernels: one row [out] takes what is added to it. inner: float32 [ranks]."""
        for (first, width, rank_first), up in zip(self._places, self._ups, strict=True):
            before = y[first : first + width].float()
            own = inner[rank_first : rank_first + up.shape[1]]
            added = (up * own[None, :, None]).sum(1).flatten()[:width]
            if self.offset is not None:
                added = added + self.offset[first : first + width]
            if self.gain is not None:
                added = added + self.gain[first : first + width] * before
            y[first : first + width] = before + added


def _ordered(vector: Tensor | None, order: Tensor | None) -> Tensor | None:
    if vector is None:
        return None
    vector = vector.float()
    return (vector if order is None else torch.cat((vector[order], vector[len(order) :]))).contiguous()


def _blocks(
    out_features: int, factors: Sequence[Factors], order: Tensor | None, *, everywhere: bool
) -> list[tuple[int, int, Tensor]]:
    """(first output, first rank, up [width, rank]) in the layer's own order of outputs."""
    starts = np.cumsum([0, *(len(each.down) for each in factors)]).tolist()
    blocks = [(each.first, start, each.up) for each, start in zip(factors, starts, strict=False)]
    if order is not None and factors:
        places = torch.arange(out_features)
        places[: len(order)] = order
        own = [(places[first : first + len(up)], first) for first, _, up in blocks]
        if all(bool(((at >= first) & (at < first + len(at))).all()) for at, first in own):
            blocks = [(first, start, up[at - first]) for (first, start, up), (at, _) in zip(blocks, own, strict=True)]
        else:
            whole = torch.zeros((out_features, starts[-1]), dtype=torch.float32)
            for first, start, up in blocks:
                whole[first : first + len(up), start : start + up.shape[1]] = up
            blocks = [(0, 0, whole[places])]
    if everywhere:
        done, gaps = 0, []
        for first, _, up in [*sorted(blocks, key=lambda each: each[0]), (out_features, 0, torch.empty(0, 0))]:
            if first > done:
                gaps.append((done, 0, torch.empty((first - done, 0))))
            done = first + len(up)
        blocks += gaps
    return blocks


def _panels(up: Tensor) -> Tensor:
    """[out, rank] -> [ceil(out / WIDTH), rank, WIDTH], zero padded."""
    out, rank = up.shape
    padded = torch.cat((up.float(), up.new_zeros((-out % WIDTH, rank), dtype=torch.float32)))
    return padded.reshape(-(-out // WIDTH), WIDTH, rank).transpose(1, 2).contiguous()


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """Rows of adapters. rows int32 [n]: of the input, adapter by adapter. groups int32 [G, 3]: adapter, first, last.
    addresses: of both."""

    rows: Int32Array
    groups: Int32Array
    addresses: tuple[int, int]

    @classmethod
    def make(cls, rows: Int32Array, groups: Int32Array) -> Groups:
        return cls(rows, groups, (rows.ctypes.data, groups.ctypes.data))

    def of(self, group: int) -> Tensor:
        """int64: the rows of one group."""
        _, first, last = self.groups[group].tolist()
        return torch.from_numpy(self.rows[first:last].astype(np.int64))


class Rows:
    """Whose each row is, of what is computed now: one for all layers of a model. Index 0 is nobody's."""

    def __init__(self) -> None:
        self._ids: Int32Array | int = 0
        self._groups: Groups | None = None
        self.any = False
        # On a GPU: whose each row is, in place of `use` (lora_device.Grouped).
        self.on_device: Any = None

    def use(self, ids: Int32Array | int) -> None:
        """int32 [rows], or one adapter for however many rows come."""
        self._ids, self._groups = ids, None
        self.any = bool(ids if isinstance(ids, int) else ids.any())

    def chosen(self, rows: Tensor) -> Int32Array | None:
        """Of these rows, int64 [n], in their order; None where none has any."""
        if not self.any:
            return None
        if isinstance(self._ids, int):
            return np.full(len(rows), self._ids, np.int32)
        return self._ids[rows.numpy()]

    @property
    def ids(self) -> Int32Array | int:
        return self._ids

    def groups(self, count: int) -> Groups:
        """Of `count` rows, which is how many there must be."""
        if isinstance(self._ids, int):
            return Groups.make(np.arange(count, dtype=np.int32), np.array([[self._ids, 0, count]], np.int32))
        assert len(self._ids) == count, "rows whose adapters nobody named"
        if self._groups is None:
            own = np.flatnonzero(self._ids)
            own = own[np.argsort(self._ids[own], kind="stable")].astype(np.int32)
            adapters = self._ids[own]
            cuts = [0, *(np.flatnonzero(np.diff(adapters)) + 1).tolist(), len(own)]
            groups = [[adapters[first], first, last] for first, last in itertools.pairwise(cuts)]
            self._groups = Groups.make(own, np.array(groups, np.int32).reshape(-1, 3))
        return self._groups


class OnDevice(Protocol):
    """A site's part of what a GPU holds (lora_device.DeviceSite)."""

    def add(self, x: Tensor, y: Tensor, rows: Any) -> None:
        """See Site.add."""
        ...

    def look_up(self, ids: Tensor, y: Tensor, rows: Any) -> None:
        """See Site.look_up."""
        ...


class Site:
    """A place where adapters add something: their branches by index, 1..capacity. device: where a GPU has them."""

    def __init__(self, capacity: int, rows: Rows) -> None:
        self.rows = rows
        self.device: OnDevice | None = None
        self.branches: dict[int, Branch] = {}
        self._table = np.zeros(capacity + 1, np.int64)
        self._table_address = self._table.ctypes.data
        self._ranks = 0
        self._replaces = False

    def put(self, index: int, branch: Branch | None) -> None:
        """The branch of an index from now on; None for no more."""
        self.branches.pop(index, None)
        self._table[index] = 0
        if branch is not None:
            self.branches[index] = branch
            self._table[index] = branch.address
        self._ranks = max((each.ranks for each in self.branches.values()), default=0)
        self._replaces = any(each.replaced for each in self.branches.values())

    @property
    def used(self) -> bool:
        """Some row of what is computed now may have something here."""
        return self.rows.any and (bool(self.branches) or self.device is not None)

    def add(self, x: Tensor, y: Tensor) -> None:
        """x [T, in], and y [T, out] what the layer beneath made of it; in place."""
        if self.device is not None:
            self.device.add(x, y, self.rows.on_device)
            return
        groups = self.rows.groups(len(x))
        if self._replaces:
            for group, index in enumerate(groups.groups[:, 0].tolist()):
                branch = self.branches.get(index)
                for each in branch.replaced if branch is not None else ():
                    rows = groups.of(group)
                    y[rows[:, None], each.columns] = each.linear(x[rows].to(each.linear.dtype)).to(y.dtype)
        library, code = native.library(), native.type_code(x.dtype)
        if library is None or code is None or y.dtype != x.dtype:
            for index, first, last in groups.groups.tolist():
                branch = self.branches.get(index)
                if branch is not None:
                    for row in groups.rows[first:last].tolist():
                        branch.up(y[row], branch.down(x[row]))
            return
        if x.stride(1) != 1:
            x = x.contiguous()
        inner = torch.empty((len(groups.rows), self._ranks), dtype=torch.float32)
        self._run(x, y, groups, inner)

    def _run(self, x: Tensor | None, y: Tensor, groups: Groups, inner: Tensor) -> None:
        """By the kernels. x None: `inner`, float32 [rows of adapters, ranks], is what `down` would make of it."""
        library, code = native.library(), native.type_code(y.dtype)
        assert library is not None and code is not None
        width = 0 if x is None else x.shape[1]
        library.by_work(len(inner) * self._ranks * (width + y.shape[1]) // 8).ol_lora(
            code,
            None if x is None else x.data_ptr(),
            0 if x is None else x.stride(0),
            width,
            y.data_ptr(),
            y.stride(0),
            *groups.addresses,
            len(groups.groups),
            self._table_address,
            inner.data_ptr(),
            self._ranks,
            torch.get_num_threads(),
        )

    def look_up(self, ids: Tensor, y: Tensor) -> None:
        """Token ids [T], and y [T, width] their rows of the layer's own table; in place."""
        if self.device is not None:
            self.device.look_up(ids, y, self.rows.on_device)
            return
        groups = self.rows.groups(len(ids))
        inner = torch.zeros((len(groups.rows), self._ranks), dtype=torch.float32)
        for group, (index, first, last) in enumerate(groups.groups.tolist()):
            branch = self.branches.get(index)
            if branch is None:
                continue
            rows = groups.of(group)
            if branch.table_rows is not None:
                _take_rows(branch, ids, y, rows)
            if branch.ranks:
                inner[first:last, : branch.ranks] = branch.inner_of(ids[rows])
        if native.library() is not None and native.type_code(y.dtype) is not None:
            self._run(None, y, groups, inner)
            return
        for index, first, last in groups.groups.tolist():
            branch = self.branches.get(index)
            if branch is not None:
                for place in range(first, last):
                    branch.up(y[int(groups.rows[place])], inner[place])


def _take_rows(branch: Branch, ids: Tensor, y: Tensor, rows: Tensor) -> None:
    """Rows of an adapter's own table, where it has them."""
    assert branch.table_rows is not None
    if branch.table is None:
        y[rows] = branch.table_rows[ids[rows].long()].to(y.dtype)
        return
    for row, token in zip(rows.tolist(), ids[rows].tolist(), strict=True):
        if token in branch.table:
            y[row] = branch.table_rows[branch.table[token]].to(y.dtype)


class StackedSites:
    """Places at the products of a layer's experts, which a GPU computes together. names: of each expert's site. device:
    what it has of all of them (lora_device.DeviceSite of the first)."""

    def __init__(self, rows: Rows, names: Sequence[str]) -> None:
        self.rows, self.names = rows, tuple(names)
        self.device: Any = None

    @property
    def used(self) -> bool:
        """See Site.used."""
        return self.rows.any and self.device is not None


class AdaptedHeads:
    """base: of latent attention, a matrix for every head. sites: what is added to each head's result."""

    def __init__(self, base: HeadLinear, sites: Sequence[Site]) -> None:
        self._base, self._sites = base, sites

    def __call__(self, x: Tensor, out: Tensor) -> Tensor:
        """See HeadLinear."""
        self._base(x, out)
        if self._sites[0].used:  # an adapter has something for every head or for none
            for head, site in enumerate(self._sites):
                site.add(x[:, head], out[:, head])
        return out


class AdaptedLinear(Linear):
    """base: the layer beneath, which need only be called where it is no Linear. product: what is added to y = base(x);
    lookup: to its rows, where it is an embedding."""

    def __init__(self, base: Linear, product: Site | None, lookup: Site | None = None) -> None:
        super().__init__(torch.empty(1, 1))
        self.out_features, self.in_features = base.out_features, base.in_features
        if isinstance(base, Linear):
            self.activation, self.dtype = base.activation, base.dtype
            self.kind, self.has_bias, self.row_tile = base.kind, base.has_bias, base.row_tile
        self.base, self.product, self.lookup = base, product, lookup

    def prepare(self, *, keep_rows: bool = False, kind: str | None = None, deterministic: bool = False) -> None:
        """Nothing is left to do."""

    @property
    def _is_used(self) -> bool:
        return self.product is not None and self.product.used

    def __call__(self, x: Tensor | Normed) -> Tensor:
        """[T, in_features] -> [T, out_features] of the same dtype."""
        if not self._is_used:
            return self.base(x)
        assert self.product is not None
        x = plain(x)
        y = self.base(x)
        self.product.add(x, y)
        return y

    def later(self, x: Tensor) -> Tensor | Product:
        """See Linear.later."""
        return self(x) if self._is_used else self.base.later(x)

    def gated(self, x: Tensor | Normed) -> Tensor:
        """See Linear.gated."""
        if not self._is_used:
            return self.base.gated(x)
        assert self.activation is not None
        return GATED_ACTIVATIONS[self.activation](self(x))

    def rows(self, ids: Tensor) -> Tensor:
        """See Linear.rows."""
        y = self.base.rows(ids)
        if self.lookup is not None and self.lookup.used:
            self.lookup.look_up(ids, y)
        return y

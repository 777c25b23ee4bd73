"""Row tiles: a product whose bits depend on the number of rows is cut into calls that all sum in one order.

Called by Linear.prepare at load time and by Linear at every call; `promise` by the composition root. Our own kernels
need none of it. oneDNN picks its kernel by the number of rows, so equal rows fall into classes with equal bits, which
depend on shape, processor and library: they are looked at, not assumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ops import native
from engine.ops.attention.base import AttentionSpec
from engine.ops.attention.torch_paged import MAX_GROUP

if TYPE_CHECKING:
    from engine.ops.linear import Linear

Multiply = Callable[[Tensor], Tensor]

TILES = (128, 64, 32, 16)
# Rows to which fewer are padded, as far as needed: one row alone is a class of its own more often than not.
LEAST = (1, 2, 16, 32)
# Beside and on the edges of the tiles that kernels are written for.
PROBES = (2, 3, 5, 8, 13, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 96, 127, 128)
# A result in bf16 hides most differences of a float32 sum: about one in a thousand shows, so this many are compared.
COMPARED = 32768
MAX_ROUNDS = 64


@dataclass(frozen=True, slots=True)
class RowTile:
    """At most `rows` rows a call and at least `least`: fewer are padded, for the counts below sum otherwise."""

    rows: int
    least: int = 1

    def __str__(self) -> str:
        return str(self.rows) if self.least == 1 else f"{self.least} to {self.rows}"

    def apply(self, multiply: Multiply, x: Tensor) -> Tensor:
        """multiply(x), tile by tile."""
        count = x.shape[0]
        if count == 0 or self.least <= count <= self.rows:
            return multiply(x)
        parts = []
        for part in x.split(self.rows):
            missing = self.least - len(part)
            parts.append(multiply(F.pad(part, (0, 0, 0, missing)))[: len(part)] if missing > 0 else multiply(part))
        return torch.cat(parts) if len(parts) > 1 else parts[0]


def seeded(seed: int) -> torch.Generator:
    """A new one, for tensors on the host. torch's own constructor needs what engine/later.py puts off."""
    return torch.default_generator.clone_state().manual_seed(seed)


def find_row_tile(multiply: Multiply, in_features: int, out_features: int, dtype: torch.dtype) -> RowTile | None:
    """The largest tile within which a row's bits depend neither on its place nor on the rows beside it.

    None where there is none. The same on one thread and on as many as are set: sums must not be cut among threads.
    """
    threads = torch.get_num_threads()
    generator = seeded(0)
    rounds = min(MAX_ROUNDS, -(-COMPARED // out_features))
    base = torch.randn(rounds, in_features, generator=generator).to(dtype)

    def agrees(tile: RowTile, count: int, reference: Tensor) -> bool:
        """Calls of `count` rows, each row somewhere else in every call."""
        for start in range(0, rounds, count):
            places = torch.arange(start, start + count) % rounds
            if not torch.equal(tile.apply(multiply, base[places]), reference[places]):
                return False
        return True

    def one_thread_agrees(tile: RowTile, reference: Tensor) -> bool:
        if threads == 1:
            return True
        torch.set_num_threads(1)
        try:
            return agrees(tile, 1, reference) and agrees(tile, tile.rows, reference)
        finally:
            torch.set_num_threads(threads)

    with torch.inference_mode():
        for least in LEAST:
            smallest = RowTile(least, least)
            alone = torch.cat([smallest.apply(multiply, row[None]) for row in base])
            best = 0
            for count in PROBES:
                if not agrees(RowTile(max(count, least), least), count, alone):
                    break
                best = count
            for rows in TILES:
                if least <= rows <= best and one_thread_agrees(tile := RowTile(rows, least), alone):
                    return tile
    return None


_found: dict[tuple[object, ...], RowTile | None] = {}


def row_tile_of(linear: Linear, multiply: Multiply) -> RowTile | None:
    """`find_row_tile` of a layer, once for each shape."""
    dtype, shape = linear.dtype, (linear.out_features, linear.in_features)
    key = (linear.kind, dtype, shape, linear.has_bias, torch.get_num_threads())
    if key not in _found:
        _found[key] = find_row_tile(multiply, linear.in_features, linear.out_features, dtype)
    return _found[key]


def promise(linears: Iterable[Linear], spec: AttentionSpec, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether a request gets the same bits whatever runs beside it, and the words for it or for why not.

    Outside the linear layers the promise rests on our own kernels: torch's elementwise functions compute the last few
    elements of a tensor by other code than the rest, so a row's bits change with its place.
    """
    if native.library() is None:
        return False, f"no native kernels: {native.status()}"
    if native.type_code(dtype) is None:
        return False, f"no native kernels for {str(dtype).removeprefix('torch.')}"
    group = max((layer.num_heads // layer.num_kv_heads for layer in spec.attending.values()), default=0)
    if group > MAX_GROUP:
        return False, f"no native attention for {group} heads on one of keys"
    tiles: dict[RowTile, None] = {}
    for linear in linears:
        if linear.kind == "native":
            continue
        if linear.row_tile is None:
            kind = {"onednn": "oneDNN", "torch": "torch"}[linear.kind]
            return False, f"{kind} multiplies [{linear.out_features}, {linear.in_features}] without a row tile"
        tiles[linear.row_tile] = None
    if not tiles:
        return True, "native kernels"
    return True, "row tile " + " and ".join(sorted(map(str, tiles)))

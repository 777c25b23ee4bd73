"""Which products are ours: every shape of weight is timed once at start, cuBLAS beside our blocks and tiles.

Blocks are for few rows, where the weight is read; tiles for many of gate and up, where the activation comes with them.

Called by CUDAExecutor before graphs are captured, so that they hold the faster way. Loop thread; blocks.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from engine.executor.cuda_device import DeviceLayer
from engine.ops.gated import LEAST_ROWS, TILES, Tile
from engine.ops.linear import Linear
from engine.ops.skinny import BLOCKS, Blocks

logger = logging.getLogger("oneloop.cuda")
W = TypeVar("W", Blocks, Tile)

# Weights of one shape are read in turn, at least so many bytes of them, or they would come from the L2 cache.
BYTES_READ = 2**28
# Ours must need at most this much of cuBLAS's time: less is within what two measurements differ by.
WORTH = 0.97
COUNTS = (1, 2, 4)
# Of a prompt's step, at which tiles are timed.
MANY_ROWS = 2048


def choose_products(linears: Iterable[Linear], layer: DeviceLayer) -> tuple[int, int]:
    """Fill in `Linear.few` for batches of 1, 2 and 4 rows. On the current stream, inside `may_block`.

    Returns how many (shape, rows) are ours, of how many. Weights that are the same in shape share a choice.
    """
    groups, ours = _by_shape(linears), 0
    for group in groups:
        sample, found = _sample(group), {}
        for rows in COUNTS:
            x = _input(sample, rows, layer)
            found[rows] = _best(
                {blocks: partial(_blocked, sample, x, blocks) for blocks in (None, *BLOCKS)}, rows, layer
            )
        few = {rows: blocks for rows, blocks in found.items() if blocks is not None}
        ours += len(few)
        for linear in group:
            linear.few = few
    return ours, len(COUNTS) * len(groups)


def choose_tiles(linears: Iterable[Linear], most_rows: int, layer: DeviceLayer) -> tuple[int, int]:
    """Fill in `Linear.tile` of gate and up, by steps of MANY_ROWS rows, or of most_rows where no step has more.

    Like choose_products; returns how many shapes are ours, of how many.
    """
    groups = _by_shape(each for each in linears if each.activation is not None)
    rows, ours = min(MANY_ROWS, most_rows), 0
    if rows < LEAST_ROWS:
        return 0, 0
    for group in groups:
        tile = None
        # The results of such a pass are large, and most of the memory is taken by now.
        with suppress(torch.OutOfMemoryError):
            sample = _sample(group)
            x = _input(sample, rows, layer)
            tile = _best({tile: partial(_tiled, sample, x, tile) for tile in (None, *TILES)}, rows, layer)
        ours += tile is not None
        for linear in group:
            linear.tile = tile
    return ours, len(groups)


def _by_shape(linears: Iterable[Linear]) -> list[list[Linear]]:
    groups: dict[tuple[object, ...], list[Linear]] = {}
    for linear in linears:
        if linear.kind == "torch":
            key = (linear.out_features, linear.in_features, linear.dtype, linear.has_bias, linear.activation)
            groups.setdefault(key, []).append(linear)
    return list(groups.values())


def _sample(group: list[Linear]) -> list[Linear]:
    first = group[0]
    return group[: max(1, -(-BYTES_READ // (first.out_features * first.in_features * first.dtype.itemsize)))]


def _input(sample: list[Linear], rows: int, layer: DeviceLayer) -> Tensor:
    x = layer.zeros((rows, sample[0].in_features), sample[0].dtype)
    layer.launch(x.normal_)
    return x


def _blocked(sample: list[Linear], x: Tensor, blocks: Blocks | None) -> None:
    """One pass over the weights."""
    for linear in sample:
        linear.by_blocks(x, blocks)


def _tiled(sample: list[Linear], x: Tensor, tile: Tile | None) -> None:
    for linear in sample:
        linear.by_tile(x, tile)


def _best(ways: dict[W | None, Callable[[], None]], rows: int, layer: DeviceLayer) -> W | None:
    """The one that takes least inside a graph; None: cuBLAS."""
    best, choice = math.inf, None
    for way, work in ways.items():
        try:
            seconds = _seconds(work, layer) / (1.0 if way is None else WORTH)
        except Exception as error:
            if layer.is_lost(error) or isinstance(error, torch.OutOfMemoryError):
                raise
            logger.warning("no product of %d rows in blocks of %s: %s", rows, way, error)
            continue
        if seconds < best:
            best, choice = seconds, way
    return choice


def _seconds(work: Callable[[], None], layer: DeviceLayer) -> float:
    inferring = torch.inference_mode()(work)
    layer.launch(inferring)  # builds and loads the kernels, which a capture must not
    return layer.time(layer.capture(inferring))

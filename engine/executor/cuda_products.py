"""Which products of few rows are ours: every shape of weight is timed once at start, cuBLAS beside our blocks.

Called by CUDAExecutor before graphs are captured, so that they hold the faster way. Loop thread; blocks.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from engine.executor.cuda_device import DeviceLayer
from engine.ops.linear import Linear
from engine.ops.skinny import BLOCKS, Blocks

logger = logging.getLogger("oneloop.cuda")

# Weights of one shape are read in turn, at least so many bytes of them, or they would come from the L2 cache.
BYTES_READ = 2**28
# Ours must need at most this much of cuBLAS's time: less is within what two measurements differ by.
WORTH = 0.97
COUNTS = (1, 2, 4)


def choose_products(linears: Iterable[Linear], layer: DeviceLayer) -> tuple[int, int]:
    """Fill in `Linear.few` for batches of 1, 2 and 4 rows. On the current stream, inside `may_block`.

    Returns how many (shape, rows) are ours, of how many. Weights that are the same in shape share a choice.
    """
    groups: dict[tuple[object, ...], list[Linear]] = {}
    for linear in linears:
        if linear.kind == "torch":
            key = (linear.out_features, linear.in_features, linear.dtype, linear.has_bias, linear.activation)
            groups.setdefault(key, []).append(linear)
    ours = 0
    for group in groups.values():
        first = group[0]
        size = first.out_features * first.in_features * first.dtype.itemsize
        sample = group[: max(1, -(-BYTES_READ // size))]
        found = {rows: _fastest(sample, rows, layer) for rows in COUNTS}
        few = {rows: blocks for rows, blocks in found.items() if blocks is not None}
        ours += len(few)
        for linear in group:
            linear.few = few
    return ours, len(COUNTS) * len(groups)


def _fastest(sample: list[Linear], rows: int, layer: DeviceLayer) -> Blocks | None:
    """None: cuBLAS."""
    x = layer.zeros((rows, sample[0].in_features), sample[0].dtype)
    layer.launch(x.normal_)
    best, choice = math.inf, None
    for blocks in (None, *BLOCKS):
        try:
            seconds = _seconds(sample, x, blocks, layer) / (1.0 if blocks is None else WORTH)
        except Exception as error:
            if layer.is_lost(error) or isinstance(error, torch.OutOfMemoryError):
                raise
            logger.warning("no product of %d rows in blocks of %s: %s", rows, blocks, error)
            continue
        if seconds < best:
            best, choice = seconds, blocks
    return choice


def _seconds(sample: list[Linear], x: Tensor, blocks: Blocks | None, layer: DeviceLayer) -> float:
    """One pass over the weights of `sample`, inside a graph."""

    def work() -> None:
        with torch.inference_mode():
            for linear in sample:
                linear.by_blocks(x, blocks)

    layer.launch(work)  # builds and loads the kernels, which a capture must not
    return layer.time(layer.capture(work))

"""How batches of each size decode: by XQA, by a kernel of ours or by a planned wrapper, as was quickest at start.

Each splits contexts its way, which leaves part of the GPU idle at some sizes. Called before graphs are captured, so
that they hold the faster way. Loop thread; blocks.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.executor.cuda_device import DeviceLayer
from engine.ops.attention.device import DecodePlan, DecodeStep
from engine.ops.attention.flashinfer import MOST_PLANNED

logger = logging.getLogger("oneloop.cuda")

# Of the wrapper, to be worth the plan that the host makes for every step.
WORTH = 0.9
# What is timed: any other size goes by the next of these.
TIMED = (1, 2, 4, 8, 16, 32, 64, 128, 256)
# Tokens of every row, and how many layers are gone through in turn, so that the L2 cache holds none of them.
CONTEXT = 1024
LAYERS = 8


def choose_attention(
    attention: Any, sizes: Sequence[int], width_of: Callable[[int], int], context: int, layer: DeviceLayer
) -> list[int]:
    """Call `attention.prefer` for what was timed. On the current stream, inside `may_block`.

    width_of: of page tables, from a number of pages. context: the longest there may be. Returns the sizes for which
    another way than the usual was quickest.
    """
    found = set()
    for window in attention.choices():
        layers = attention.layers_of(window)[:LAYERS]
        for size in (size for size in sizes if size in TIMED):
            ways = [way for way in attention.ways(window) if way != "wrapper" or size <= MOST_PLANNED]
            if len(ways) == 1:
                attention.prefer(window, size, ways[0], ways[0])
                continue
            trial, seconds = Trial(attention, window, size, width_of, min(CONTEXT, context), layer), {}
            for way in ways:
                try:
                    seconds[way] = trial.seconds(layers, way)
                except Exception as error:
                    if layer.is_lost(error) or isinstance(error, torch.OutOfMemoryError):
                        raise
                    logger.info("decode of %d rows by %s is not timed: %s", size, way, error)
            planned = seconds.pop("wrapper", math.inf)
            if not seconds:
                continue
            unplanned = min(seconds, key=seconds.__getitem__)
            way = "wrapper" if planned < WORTH * seconds[unplanned] else unplanned
            if way != attention.ways(window)[0]:
                found.add(size)
            attention.prefer(window, size, way, unplanned)
    return sorted(found)


class Trial:
    """A decode step of `size` rows of the same length, planned."""

    def __init__(
        self,
        attention: Any,
        window: int | None,
        size: int,
        width_of: Callable[[int], int],
        context: int,
        layer: DeviceLayer,
    ) -> None:
        page_size, most = attention.page_size, attention.num_pages
        self.layer = layer
        shape = attention.shape
        self.q = layer.zeros((size, shape.num_heads, shape.head_dim), attention.dtype)
        count = min(-(-context // page_size), most)
        context = min(context, count * page_size)
        pages = torch.arange(size * count, dtype=torch.int32) % most + 1
        width = width_of(count)
        tables = torch.zeros((size, width), dtype=torch.int32)
        tables[:, :count] = pages.view(size, count)
        lengths = torch.full((size,), context, dtype=torch.int32)
        ones = torch.zeros(size, dtype=torch.int64)
        tables, lengths, ones, on_device = (self._sent(each) for each in (tables, lengths, ones, pages))
        groups = attention.num_groups
        self.step = DecodeStep(lengths, [ones] * groups, [tables] * groups, lengths, 0)
        indptr = torch.arange(size + 1, dtype=torch.int32) * count
        last = torch.full((size,), context - (count - 1) * page_size, dtype=torch.int32)
        self.attention, self.window, self.width = attention, window, width
        self.plan = DecodePlan(indptr, last, [on_device] * groups)

    def _sent(self, source: Tensor) -> Tensor:
        """On the device."""
        flat = source.reshape(-1)
        pinned = self.layer.pinned(flat.numel() * flat.itemsize).view(flat.dtype)
        pinned.copy_(flat)
        target = self.layer.zeros((flat.numel(),), flat.dtype)
        self.layer.upload(target, pinned)
        self.layer.synchronize_all()
        return target.view(source.shape)

    def seconds(self, layers: Sequence[int], way: str) -> float:
        """One call for each layer, inside a graph. Raises where there is no such kernel."""
        if way == "wrapper":
            self.attention.plan_wrapper(self.window, self.plan, len(self.q), self.width, 0)

        def work() -> None:
            with torch.inference_mode():
                for index in layers:
                    self.attention.decode_by(way, index, self.q, self.step)

        self.layer.launch(work)  # builds and loads the kernels, which a capture must not
        return self.layer.time(self.layer.capture(work))

"""Steps with prompts in pieces: all that lies between one attention and the next is a CUDA graph.

Attention depends on the lengths of a step's rows and is launched as ever; the rest depends on the number of tokens
alone, padded up to a size. A small step then costs the host three launches a layer instead of ten. Owned by the CUDA
executor, loop thread.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.executor.cuda_device import CapturesOver, DeviceLayer, Graph
from engine.forward import Limits
from engine.models.parts.decoder import CausalLM
from engine.ops.attention.device import DeviceAttention, StepAttention

logger = logging.getLogger("oneloop.cuda")

# Tokens, padding included. Larger steps keep the device busy for longer than the host needs to launch them.
SIZES = (16, 32, 64, 96, 128, 192, 256, 384, 512)


class Cells(NamedTuple):
    """What `StepAttention` writes k and v by: cells of each memory group."""

    positions: Tensor
    kv_slots: Sequence[Tensor]


class _Cut(StepAttention):
    """Ends a piece where attention is to be."""

    def __init__(self, backend: DeviceAttention, pieces: Pieces, cut: Callable[[], None], size: int) -> None:
        inputs = pieces.inputs(size)
        super().__init__(backend, Cells(inputs[1], inputs[2:].unbind()))
        self.q = pieces.q[:size]
        self._cut, self._out = cut, pieces.out[:size]
        self.layers: list[int] = []

    def attend(self, layer: int, q: Tensor, out: Tensor | None = None, sinks: Tensor | None = None) -> Tensor:
        self.layers.append(layer)
        self._cut()
        return self._out


@dataclass(slots=True)
class Chain:
    """parts: graphs, one more than layers; between part i and the next the attention of layers[i]."""

    parts: list[Graph]
    layers: list[int]


class Pieces:
    """Chains of graphs by number of tokens, and the memory that they read and write: one step's at a time.

    q [most, Hq, D], out [most, Hq, Dv]: what attention reads and writes. hidden [most, hidden_size]: the end. Rows of
    padding write to the cell of padding.
    """

    def __init__(
        self, model: CausalLM, layer: DeviceLayer, attention: DeviceAttention, limits: Limits, *, enabled: bool
    ) -> None:
        # Where layers differ, no one buffer fits what their attentions read and write; recurrent states depend on the
        # rows of a step, as attention does.
        spec = model.attention_spec
        shape = spec.common or spec.latent
        usable = enabled and shape is not None and limits.num_snapshots is None
        self._all = [size for size in SIZES if size <= limits.max_num_batched_tokens] if usable else []
        self.sizes = list(self._all)
        self._layer, self._attention = layer, attention
        # By size, and whether some row has an adapter.
        self._chains: dict[tuple[int, bool], Chain] = {}
        # See GraphCache.
        self.agree: Callable[[bool], bool] | None = None
        self._seen: set[tuple[int, bool]] = set()
        # Where the model computes so many rows of which some have adapters; the executor's, if it has any.
        self.adapting: Callable[[int], AbstractContextManager[None]] | None = None
        most = max(self.sizes, default=0)
        heads, dims = (0, (0, 0)) if shape is None else (shape.num_heads, (shape.head_dim, shape.value_dim))
        # Token ids, positions and every memory group's cells, each of as many as the step's size.
        self.num_inputs = 2 + len(limits.groups)
        self._inputs = layer.zeros((self.num_inputs * most,), torch.int32)
        # Rows of padding are computed with the others: of `out` they read zeros.
        self.q, self.out = (layer.zeros((most, heads, dim), attention.dtype) for dim in dims)
        self.hidden = layer.zeros((most, model.config.hidden_size), attention.dtype)
        # What some layers read, alike, where somebody wants to know.
        self.aux: list[Tensor] = []

    def keep_aux(self, count: int) -> None:
        """Have memory for what so many layers read. Raises torch.OutOfMemoryError."""
        self.aux = [self._layer.zeros(tuple(self.hidden.shape), self.hidden.dtype) for _ in range(count)]

    def __len__(self) -> int:
        """Sizes that there are chains of."""
        return len({size for size, _ in self._chains})

    def size(self, tokens: int) -> int | None:
        """To which number of tokens a step is padded; None where it is launched operation by operation."""
        place = bisect_left(self.sizes, tokens)
        return self.sizes[place] if place < len(self.sizes) else None

    def inputs(self, size: int) -> Tensor:
        """int32 [num_inputs, size]: token ids, positions, and of each memory group the cells of k and v."""
        return self._inputs[: self.num_inputs * size].view(self.num_inputs, size)

    def get(self, model: CausalLM, size: int, adapted: bool = False) -> Chain | None:
        """The chain of a size, captured at its second use; on the compute stream."""
        key = size, adapted
        if key not in self._chains and size in self.sizes:
            if key in self._seen:
                self.capture(model, size, adapted)
            self._seen.add(key)
        return self._chains.get(key)

    def capture(self, model: CausalLM, size: int, adapted: bool = False) -> None:
        """Run the pieces once, on padding, then record them. Where that cannot be had, such steps go on without."""
        inputs, layers = self.inputs(size), list[int]()

        def work(cut: Callable[[], None]) -> None:
            attention: Any = _Cut(self._attention, self, cut, size)
            with torch.inference_mode(), self.adapting(size) if adapted and self.adapting else nullcontext():
                # What rows of padding compute goes to page 0, which windows read with weight 0: a NaN that a step left
                # in theirs would be in all of them. The others are written by attention before they are read.
                self.out[:size].zero_()
                self.hidden[:size].copy_(model.forward(inputs[0], inputs[1], attention))
                for to, source in zip(self.aux, getattr(model, "aux", []), strict=False):
                    to[:size].copy_(source)
            layers[:] = attention.layers

        parts: list[Graph] = []
        problem: Exception | None = None
        warm = False
        try:
            self._layer.launch(self._inputs.zero_)
            self._layer.launch(lambda: work(lambda: None))  # builds and loads the kernels, which a capture must not
            warm = True
            parts = self._layer.capture_parts(work)
        except Exception as error:
            # Sums in which other ranks wait may be missing.
            if self._layer.is_lost(error) or (self.agree is not None and not warm):
                raise
            problem = error
        if self.agree is not None and not self.agree(problem is None):
            problem = CapturesOver(str(problem or "another rank could not"))
        if problem is not None:
            logger.warning("no CUDA graphs for steps of %d tokens with prompts: %s", size, problem)
            if isinstance(problem, CapturesOver):
                self._all = []
            self.sizes = [each for each in self.sizes if each != size and each in self._all]
            return
        self._chains[size, adapted] = Chain(parts, list(layers))

    def clear(self) -> None:
        self._chains.clear()
        self._seen.clear()
        # Memory may be had again that was not there before.
        self.sizes = list(self._all)

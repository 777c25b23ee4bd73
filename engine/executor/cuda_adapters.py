"""LoRA adapters of the CUDA executor: in host memory as the device wants them, on the device by index, and whose the
rows of a step are. What a GPU does not compute is refused as it is read.

Owned by CUDAExecutor; loop thread, except `read`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.executor.cuda_buffers import CudaHandle
from engine.executor.cuda_device import DeviceLayer
from engine.forward import ForwardInput, Int32Array
from engine.lora.base import is_here, own_rows
from engine.lora.reader import AddUp, read_adapter
from engine.lora.words import AdapterError
from engine.models.loading.adapted import AdaptedLayers, ExpertMatrix, Heads, Place
from engine.models.parts.decoder import CausalLM
from engine.models.parts.source import PREFIX
from engine.ops.lora_device import FIELDS, ROWS, DeviceSite, Grouped, Shelf, SiteShape, group, num_blocks, room_of


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class PinnedWeights:
    """See words.AdapterWeights. data: a row of Shelf.memory; table int32: its row of Shelf.table; both page-locked."""

    rank: int
    num_bytes: int
    base_model_name: str
    digest: str
    data: Tensor
    table: Tensor


# What is in the names of experts, whose adapters take what room others leave.
EXPERTS = ".experts."
# The side that chains of graphs read, of whatever parity a step is.
CHAIN = 2
# Behind it those of the rows that sample, where a step's tokens are more: of a parity, SAMPLED + parity.
SAMPLED = 3


class _Side:
    """Whose the rows of steps of one parity are, on the host and on the device. Owners lie first, then the order."""

    def __init__(self, layer: DeviceLayer, blocks: int) -> None:
        # So that the order begins on a multiple of 16 bytes: kernels are compiled anew for pointers that do not.
        self.blocks = blocks = -(-blocks // 4) * 4
        self.host = layer.pinned(4 * blocks * (1 + ROWS)).view(torch.int32)
        self.device = layer.zeros((blocks * (1 + ROWS),), torch.int32)
        self.array: Int32Array = self.host.numpy()
        # What the device has; how much of it is to be sent.
        self.ids: Int32Array | None = None
        self.to_send = 0

    def view(self, blocks: int) -> Grouped:
        """Of a step of so many blocks; always at the same addresses."""
        return Grouped(self.device[self.blocks : self.blocks + blocks * ROWS], self.device[:blocks])


class DeviceAdapters:
    """See the module. max_rank: of adapters' modules. most_rows: of one step. room_mib: of each adapter; where it is
    not said, what factors of that rank take at all layers but experts. Raises torch.OutOfMemoryError."""

    def __init__(
        self, model: CausalLM, layer: DeviceLayer, max_rank: int, most_rows: int, room_mib: float | None = None
    ) -> None:
        layers = model.adapted
        assert isinstance(layers, AdaptedLayers)
        self.layer, self.max_rank, self.capacity = layer, max_rank, layers.capacity
        shapes = site_shapes(layers, max_rank)
        self._names = tuple(shapes)
        self._numbers = {name: number for number, name in enumerate(shapes)}
        dtype = model.linears[0].dtype
        room = room_of((shape for name, shape in shapes.items() if EXPERTS not in name), dtype)
        room = room if room_mib is None else int(room_mib * 2**20) // dtype.itemsize
        self.shelf = Shelf(list(shapes.values()), layers.capacity, dtype, room)
        self.rows = layers.rows
        # By index: what has it, and what is not yet on its way to the device.
        self._held: dict[int, PinnedWeights] = {}
        self._pending: dict[int, PinnedWeights] = {}
        self._sides = [_Side(layer, num_blocks(most_rows, layers.capacity)) for _ in range(5)]
        # Rows in their order that are all of one adapter, by its index.
        most = -(-most_rows // ROWS)
        self._in_order = torch.arange(most * ROWS, dtype=torch.int32).to(layer.device)
        self._of_one = torch.arange(layers.capacity + 1, dtype=torch.int32)[:, None].repeat(1, most).to(layer.device)
        self.attach(model)

    @property
    def num_bytes(self) -> int:
        return self.shelf.num_bytes

    def attach(self, model: CausalLM) -> None:
        """Have a model's layers ask for what is here: this one's, or another's of the same spec. Raises
        torch.OutOfMemoryError."""
        self._take_memory()
        layers = model.adapted
        assert isinstance(layers, AdaptedLayers)
        replaced = (name for name, number in self._numbers.items() if _may_replace(self.shelf.shapes[number]))
        layers.on_device, layers.whole_on_device = frozenset(self._names), frozenset(replaced)
        if (whole := layers.whole) is not None:
            elsewhere = {place.site for place in whole.places.values() if not is_here(place)}
            whole.on_device, whole.whole_on_device = layers.on_device | elsewhere, layers.whole_on_device
        for stack in layers.stacks:
            first = self._numbers[stack.names[0]]
            assert self._numbers[stack.names[-1]] == first + len(stack.names) - 1
            stack.device = DeviceSite(self.shelf, first, self.layer.device)
        together = {name for stack in layers.stacks for name in stack.names}
        for name, number in self._numbers.items():
            if name not in together:
                layers.sites[name].device = DeviceSite(self.shelf, number, self.layer.device)
        # Last: where this fails the old model serves on, with its adapters.
        self.rows = layers.rows

    # ---- adapters

    def read(self, path: Path, layers: Any, add_up: AddUp | None = None) -> PinnedWeights:
        """An adapter's directory. add_up: see read_adapter. On any thread. Raises AdapterError."""
        with self.layer.aside():
            found = read_adapter(path, layers.whole or layers, self.max_rank, add_up)
        name = path.name.encode("unicode_escape").decode()[:100]
        branches = {self._numbers[site]: branch for site, branch in found.branches.items()}
        try:
            data, table = self.shelf.pack(branches)
            with self.layer.aside():
                pinned = tuple(self.layer.pinned(each.nbytes).view(each.dtype) for each in (data, table))
        except ValueError as error:
            raise AdapterError(f"adapter {name}: {error}") from None
        except RuntimeError as error:
            raise AdapterError(f"adapter {name}: no page-locked memory: {str(error).splitlines()[0]}") from None
        for to, source in zip(pinned, (data, table), strict=True):
            to.copy_(source)
        return PinnedWeights(found.rank, data.nbytes, found.base_model_name, found.digest, *pinned)

    def load(self, forward_input: ForwardInput, handle: CudaHandle) -> None:
        """Bring the step's new adapters to the device. Compute stream: behind the steps that may still read what had
        their indices, and before this one. What fails is tried again by the next step."""
        self.expect(forward_input)
        for index, weights in list(self._pending.items()):
            handle.keep += [weights.data, weights.table]
            self._upload(index, weights)
            del self._pending[index]

    def expect(self, forward_input: ForwardInput) -> None:
        """The step's new adapters, to be brought by it or, where it fails before that, by the next one."""
        for index, weights in forward_input.adapter_loads:
            if weights is None:
                self._held.pop(index, None)
                self._pending.pop(index, None)
            elif self._held.get(index) is not weights:
                self._held[index] = self._pending[index] = weights

    def drop(self, indices: Sequence[int]) -> None:
        """Nobody asks for these any more, and no step is in flight."""
        for index in indices:
            self._held.pop(index, None)
            self._pending.pop(index, None)

    def _upload(self, index: int, weights: PinnedWeights) -> None:
        self.layer.upload(self.shelf.memory[index - 1, : len(weights.data)], weights.data)
        self.layer.upload(self.shelf.table[index], weights.table)

    def _take_memory(self) -> None:
        """Of all adapters; after `release_memory` those that were there come back with the next step."""
        shelf = self.shelf
        if not shelf.memory.numel():
            # Both or none: what is there is not asked for again.
            memory = self.layer.zeros((shelf.capacity, shelf.room), shelf.dtype)
            table = self.layer.zeros((shelf.capacity + 1, FIELDS * len(shelf.shapes)), torch.int32)
            shelf.memory, shelf.table = memory, table
            self._pending = dict(self._held)

    def release_memory(self) -> None:
        """Give it back until a model is attached; graphs that were captured with it are void."""
        self.shelf.memory, self.shelf.table = (torch.empty(0, dtype=each) for each in (self.shelf.dtype, torch.int32))

    # ---- rows

    def note(self, ids: Int32Array, parity: int) -> int:
        """The adapters of a step's rows, or of its tokens: to be sent with it. parity: or SAMPLED more. Returns how
        many blocks they fill."""
        side = self._sides[parity]
        blocks = num_blocks(len(ids), self.capacity)
        if side.ids is None or not np.array_equal(side.ids, ids):
            side.ids = None
            group(ids, side.array[side.blocks : side.blocks + blocks * ROWS], side.array[:blocks])
            side.to_send = side.blocks + blocks * ROWS
            side.ids = ids.copy()
        return blocks

    def send(self, parity: int) -> None:
        """What `note` found, where the device has something else. Upload stream, with the rest of the step."""
        for side in (self._sides[parity], self._sides[SAMPLED + parity]):
            if side.to_send:
                known, side.ids = side.ids, None
                self.layer.upload(side.device[: side.to_send], side.host[: side.to_send])
                side.ids, side.to_send = known, 0

    def copy_to_chain(self, parity: int, rows: int) -> None:
        """What was noted for so many rows of this parity, to where chains read it; compute stream, in a launch."""
        count = self._sides[parity].blocks + num_blocks(rows, self.capacity) * ROWS
        self._sides[CHAIN].device[:count].copy_(self._sides[parity].device[:count])

    @contextlib.contextmanager
    def used(self, side: int, rows: int) -> Iterator[None]:
        """What the model computes meanwhile are so many rows, padding included, that were noted for this parity; or
        CHAIN, or SAMPLED and the parity."""
        with self._using(self._sides[side].view(num_blocks(rows, self.capacity))):
            yield

    @contextlib.contextmanager
    def used_by(self, index: int, rows: int) -> Iterator[None]:
        """They are at most so many rows of one adapter, or of none."""
        if not index:
            yield
            return
        blocks = -(-rows // ROWS)
        with self._using(Grouped(self._in_order[: blocks * ROWS], self._of_one[index, :blocks])):
            yield

    @contextlib.contextmanager
    def _using(self, rows: Grouped) -> Iterator[None]:
        self.rows.any, self.rows.on_device = True, rows
        try:
            yield
        finally:
            self.rows.any, self.rows.on_device = False, None


def site_shapes(layers: AdaptedLayers, max_rank: int) -> Mapping[str, SiteShape]:
    """Of the layers whose adapters a GPU computes, by the names of their sites: all but what latent attention splits
    into heads. Outputs of an adapter's own are for those outside the decoder's layers."""
    begin = PREFIX + layers.spec.layer_names.split("{}")[0]
    places: dict[str, list[Place]] = {}
    for place in layers.places.values():
        if not isinstance(place.linear, Heads):
            places.setdefault(place.site, []).append(place)
    # Matrices of a layer's experts are the same.
    of_experts: dict[int, SiteShape] = {}
    shapes = {}
    for site, of_site in places.items():
        matrix = of_site[0].linear
        shapes[site] = of_experts.get(id(matrix)) or _shape(of_site, max_rank)
        if isinstance(matrix, ExpertMatrix):
            of_experts[id(matrix)] = shapes[site]
    return {
        site: shape if site.startswith(begin) else dataclasses.replace(shape, replaced=not shape.is_table)
        for site, shape in shapes.items()
    }


def _may_replace(shape: SiteShape) -> bool:
    return shape.replaced or shape.is_table


def _shape(places: list[Place], max_rank: int) -> SiteShape:
    linear = places[0].linear
    if places[0].is_table:
        return SiteShape(linear.out_features, linear.in_features, ((0, linear.in_features),), max_rank, is_table=True)
    parts = []
    for place in places:
        ours = own_rows(place)[0]
        first, end = int(ours.min()), int(ours.max()) + 1
        parts.append((first, end))
        if end - first != len(ours):  # its outputs lie among another's
            max_rank, parts = len(places) * max_rank, [(0, linear.out_features)]
            break
    return SiteShape(linear.in_features, linear.out_features, tuple(sorted(parts)), max_rank)

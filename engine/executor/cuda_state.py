"""What all steps of the CUDA executor share: streams, state by slot on the device, and the way there and back.

Base of the kinds of steps (cuda_decode.py, cuda_mixed.py, cuda_draw.py), which CUDAExecutor puts together.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.executor.cuda_adapters import SAMPLED, DeviceAdapters
from engine.executor.cuda_buffers import CudaHandle, Side, widened
from engine.executor.cuda_device import DeviceLayer
from engine.executor.cuda_drafter import DeviceDrafter
from engine.executor.cuda_graph import GraphCache
from engine.executor.cuda_group import RankGroup
from engine.executor.cuda_pieces import Pieces
from engine.executor.pooling import Pooler
from engine.executor.tables import SlotTables
from engine.forward import DeviceLostError, ForwardError, ForwardInput, ForwardOutput, Int32Array, Limits, Staging
from engine.models.parts.decoder import CausalLM
from engine.ops.attention.device import DeviceAttention
from engine.ops.sampling.device_extras import DeviceExtras
from engine.ops.sampling.layout import WORDS
from engine.ops.state import States

logger = logging.getLogger("oneloop.cuda")


class DeviceState:
    """See the module. attention: owns the KV memory, limits.num_pages + 1 pages. cuda_graph: lazy, start or off."""

    def __init__(
        self, model: CausalLM, limits: Limits, layer: DeviceLayer, attention: DeviceAttention, cuda_graph: str
    ) -> None:
        self.limits = limits
        self.layer = layer
        self.model = model
        self.attention = attention
        wide = widened(limits) if limits.max_draft_tokens else None
        # Of a step.
        self._most_rows = limits.max_num_seqs if wide is None else wide.max_num_seqs
        most_rows = None if wide is None else wide.max_num_seqs
        self.graphs = GraphCache(layer, cuda_graph, limits.max_num_seqs, limits.max_pages_per_seq, most_rows)
        self.num_steps = 0
        with layer.may_block():
            self._sides: tuple[Side, ...] = self._make_sides()
            if wide is not None:
                self._sides += Side(layer, wide, 2), Side(layer, wide, 3)
            # State by slot, on the device.
            self._page_tables = layer.zeros(
                (len(limits.groups), limits.num_slots, limits.max_pages_per_seq), torch.int32
            )
            self._last_token = layer.zeros((limits.num_slots,), torch.int32)
            self._sampling = layer.zeros((limits.num_slots, WORDS), torch.int32)
            # Of layers with a recurrent state, by slot and by snapshot.
            self._states: States | None = None
            if limits.num_snapshots is not None:
                self._states = States(model.config.states, limits, attention.dtype, layer.device)
            attention.states = self._states
            self.pieces = Pieces(model, layer, attention, limits, enabled=self.graphs.enabled)
            self._compute, self._upload, self._download = layer.stream(), layer.stream(), layer.stream()
            layer.synchronize_all()
            with layer.on(self._compute):
                attention.settle(layer.synchronize_all)
            layer.synchronize_all()
        self._flat_table = self._page_tables.view(-1)
        self._extras = DeviceExtras(limits, layer.zeros)
        self._pooler = Pooler(self._use_slots)
        # Of the step whose vectors are computed now: adapters by slot, and tokens.
        self._pooled_by: tuple[dict[int, int], int] = {}, 0
        self.staging: tuple[Staging, Staging] = (self._sides[0].staging, self._sides[1].staging)
        # What the host plans from; the device has its own image of all of it.
        self._tables = SlotTables(limits)
        # A step has failed at its launch, maybe before its diffs were on their way.
        self._lost_diffs = False
        self._filters: npt.NDArray[np.bool_] = np.zeros(limits.num_slots, np.bool_)
        # Logits of an open step, which draws before the next begins.
        self._open: Tensor | None = None
        self._in_flight = 0
        self._lost: DeviceLostError | None = None
        self._closed = False
        self._idle_timer: asyncio.TimerHandle | None = None
        self._adapters: DeviceAdapters | None = None
        self._drafter: DeviceDrafter | None = None
        # Of ranks that compute together, of which this is one.
        self._group: RankGroup | None = None
        self._faster: list[tuple[str, Any]] = []
        self._faster_mixtures: list[tuple[object, Any]] = []
        # Held while memory moves, on another thread: no graph may be captured meanwhile.
        self._moving = threading.Lock()

    def _make_sides(self) -> tuple[Side, Side]:
        return Side(self.layer, self.limits, 0), Side(self.layer, self.limits, 1)

    def _finish(self, side: Side, handle: CudaHandle) -> None:
        """Bring the sampled tokens to the host."""
        layer = self.layer
        with layer.on(self._compute):
            layer.record(side.computed)
        with layer.on(self._download):
            layer.wait(side.computed)
            layer.download(side.result_host[: handle.num_rows], side.out[: handle.num_rows])
            for to, source in handle.downloads:
                layer.download(to, source)
            layer.record(side.done)

    def _send(self, side: Side, num_bytes: int, num_meta: int = 0) -> None:
        """Upload the used part of the staging arena, and of the metadata."""
        layer = self.layer
        with layer.on(self._upload):
            # The step before last has read this image; it is done, unless it was one that warmed up a graph.
            layer.wait(side.computed)
            try:
                layer.upload(side.block[:num_bytes], side.arena.memory[:num_bytes])
                if num_meta:
                    layer.upload(side.meta[:num_meta], side.meta_host[:num_meta])
                if self._adapters is not None:
                    self._adapters.send(side.parity)
            finally:
                layer.record(side.uploaded)

    def _has_adapters(self, slots: Int32Array) -> bool:
        """Whether any of these seq slots has one."""
        return self._adapters is not None and bool(self._tables.adapter[slots].any())

    def _note_adapters(self, slots: Int32Array, lengths: Int32Array | int, size: int, side: Side) -> None:
        """Whose the rows of a step are goes with its other arrays: of these seq slots, so many tokens of each, and
        nobody's up to `size`."""
        assert self._adapters is not None
        ids = np.repeat(self._tables.adapter[slots], lengths)
        self._adapters.note(np.concatenate((ids, np.zeros(size - len(ids), np.int32))), side.parity)

    def _adapting(self, adapted: bool, side: Side, rows: int) -> AbstractContextManager[None]:
        """Where the model computes a step's rows, padding included; only inside `DeviceLayer.launch` or a capture."""
        if not adapted:
            return contextlib.nullcontext()
        assert self._adapters is not None
        return self._adapters.used(side.parity, rows)

    def _adapting_sampled(self, adapted: bool, side: Side, rows: int) -> AbstractContextManager[None]:
        """The same where logits of a step's rows that sample are computed."""
        if not adapted:
            return contextlib.nullcontext()
        assert self._adapters is not None
        return self._adapters.used(SAMPLED + side.parity, rows)

    def _adapting_one(self, index: int, rows: int) -> AbstractContextManager[None]:
        """The same of so many rows of one adapter."""
        return self._adapters.used_by(index, rows) if self._adapters is not None else contextlib.nullcontext()

    def _use_slots(self, slots: list[int]) -> AbstractContextManager[None]:
        """What the pooler's heads compute next, of one slot where any has an adapter."""
        owners, rows = self._pooled_by
        return self._adapting_one(owners.get(slots[0], 0), rows)

    def _send_tables(self, handle: CudaHandle) -> None:
        """Bring the host's page tables and sampling parameters to the device, whole. A row that wrote by an entry that
        a failed step should have changed would write to another's page."""
        layer, host = self.layer, (self._tables.page_tables, self._tables.sampling.view(np.int32))
        for to, source in zip((self._page_tables, self._sampling), host, strict=True):
            pinned = layer.pinned(source.nbytes).view(torch.int32)
            pinned.numpy()[:] = source.reshape(-1)
            handle.keep.append(pinned)
            with layer.on(self._compute):
                layer.upload(to.view(-1), pinned)
        self._extras.distrust()
        self._lost_diffs = False

    def _send_grown_diffs(self, forward_input: ForwardInput, side: Side, handle: CudaHandle) -> tuple[Tensor, Tensor]:
        """Table diffs that outgrew the arena travel on their own."""
        count, layer = forward_input.num_table_diffs, self.layer
        staging = side.staging
        with layer.on(self._upload):
            sent = []
            for array in (staging.table_index, staging.table_page):
                tensor = layer.zeros((count,), torch.int32)
                layer.upload(tensor, torch.from_numpy(array[:count]))
                sent.append(tensor)
            handle.keep += sent
            layer.record(side.uploaded)
        return sent[0], sent[1]

    def _apply_diffs(self, forward_input: ForwardInput, side: Side, handle: CudaHandle) -> None:
        """Table and sampling diffs by operations of their own; compute stream."""
        count, changed = forward_input.num_table_diffs, forward_input.num_sampling_diffs
        index, pages = side.table_index[:count], side.table_page[:count]
        if count and side.staging.table_index is not side.first_index:
            index, pages = self._send_grown_diffs(forward_input, side, handle)
            self.layer.wait(side.uploaded)

        def work() -> None:
            if count:
                self._flat_table.index_copy_(0, index.long(), pages)
            if changed:
                self._sampling.index_copy_(0, side.sampling_slot[:changed].long(), side.sampling[:changed])

        if count or changed:
            self.layer.launch(work)
        if changed:
            for change in self._extras.apply(forward_input, lambda arrays: self._send_arrays(arrays, handle)):
                self.layer.launch(change)

    def _send_arrays(self, arrays: Sequence[npt.NDArray[Any]], handle: CudaHandle) -> list[Tensor]:
        """Host arrays of 4-byte numbers, to be used on the compute stream from now on. Called on that stream."""
        layer, side = self.layer, handle.side
        # Each on a multiple of 16 bytes: kernels are compiled anew for pointers that are not so aligned.
        starts = np.cumsum([0, *(-(-len(array) // 4) * 4 for array in arrays)]).tolist()
        size = max(1, starts[-1])
        pinned = layer.pinned(4 * size).view(torch.int32)
        host = pinned.numpy()
        for array, start in zip(arrays, starts, strict=False):
            host[start : start + len(array)] = array.view(np.int32)
        with layer.on(self._upload):
            sent = layer.zeros((size,), torch.int32)
            layer.upload(sent, pinned)
            layer.record(side.uploaded)
        layer.wait(side.uploaded)
        handle.keep += [pinned, sent]
        parts = [sent[start : start + len(array)] for array, start in zip(arrays, starts, strict=False)]
        return [
            part.view(torch.float32) if array.dtype == np.float32 else part
            for array, part in zip(arrays, parts, strict=True)
        ]

    def _bring(
        self,
        handle: CudaHandle,
        source: Tensor,
        read: Callable[[ForwardOutput, Int32Array], object],
        *,
        early: bool = False,
    ) -> Int32Array:
        """Download int32 [n, k] with the step's tokens and let `read` put it into the output. early: now, until
        side.told; called on the compute stream. Returns where it comes to."""
        layer, side = self.layer, handle.side
        host = layer.pinned(4 * source.numel()).view(torch.int32).view(source.shape)
        handle.keep += [source, host]
        if early:
            layer.record(side.drafted)
            with layer.on(self._download):
                layer.wait(side.drafted)
                layer.download(host, source)
                layer.record(side.told)
        else:
            handle.downloads.append((host, source))
        array: Int32Array = host.numpy()
        handle.readers.append(lambda output: read(output, array))
        return array

    def _ask_for_aux(self, model: Any) -> None:
        """What drafts goes on from this model, and may want to see what some layers read."""
        if self._drafter is not None:
            self._drafter.use(model)
            if self._drafter.aux_layers:
                model.aux_layers = self._drafter.aux_layers

    def _aux(self, chained: int | None = None) -> list[Tensor]:
        """What some layers read in the forward that was launched last, for a head; chained: by graphs, of so many
        tokens."""
        if chained is not None:
            return [each[:chained] for each in self.pieces.aux]
        model: Any = self.model
        aux: list[Tensor] = getattr(model, "aux", [])
        if aux:
            model.aux = []
        return aux

    def _launch_drafts(self, side: Side, handle: CudaHandle) -> None:
        """What is read and drafted before a step; compute stream, behind its diffs."""
        drafter, reading = self._drafter, handle.reading
        assert drafter is not None and reading is not None

        def send(parity: int, to: Tensor, source: Tensor, words: int) -> None:
            with self.layer.on(self._upload):
                # The step before last of this parity, of whichever side, has read what was there.
                for each in self._sides[parity::2]:
                    self.layer.wait(each.computed)
                self.layer.upload(to[:words], source[:words])
                self.layer.record(side.uploaded)
            self.layer.wait(side.uploaded)

        found = drafter.launch(reading, side, send)
        if found is not None:
            rows = [row for row, _, _ in reading.spots]

            def tell(output: ForwardOutput, host: Int32Array) -> None:
                handle.told = dict(zip(rows, host[:, 0].tolist(), strict=True))

            masks = None if handle.given is None else handle.given.masks
            of_rows = handle.drafted.rows[rows] if handle.drafted is not None else rows
            is_early = masks is not None and bool(np.isin(of_rows, masks.rows).any())
            host = self._bring(handle, found[:, None], tell, early=is_early)
            if is_early:  # masks are made behind them while the step runs
                handle.early = host[:, 0]

    # ---- errors

    def _judge(self, error: Exception) -> Exception:
        """What an exception at launch means for its step, and for the device."""
        if self.layer.is_lost(error):
            self._lose(error)
            assert self._lost is not None
            return self._lost
        if isinstance(error, torch.OutOfMemoryError):
            return ForwardError(f"out of device memory: {str(error).splitlines()[0]}")
        if isinstance(error, ForwardError):
            return error
        logger.error("a step could not be launched", exc_info=error)
        return ForwardError(f"{type(error).__name__}: {error}")

    def _lose(self, error: BaseException) -> None:
        if self._lost is None:
            logger.critical("the device is lost: %s", error)
            self._lost = DeviceLostError(f"the device failed: {error}")
            self._lost.__cause__ = error

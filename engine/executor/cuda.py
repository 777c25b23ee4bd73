"""CUDAExecutor: steps on a GPU. Launched from the loop thread, which never waits for the device.

Three streams: compute, and one for copies each way (a small upload must not queue behind a download that waits for
the step before it). Everything of a step exists twice and alternates by the step's parity: pinned staging, its image
on the device, metadata, sampled tokens. One waiter thread sleeps on events and wakes the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.config import StartupError
from engine.executor.base import StepHandle
from engine.executor.cuda_device import DeviceLayer
from engine.executor.cuda_graph import GraphCache, GraphKey
from engine.executor.cuda_products import choose_products
from engine.executor.tables import PagedMetadata, SlotTables
from engine.forward import (
    FUTURE_TOKEN,
    NULL_PAGE,
    NULL_SLOT,
    DeviceLostError,
    ForwardError,
    ForwardInput,
    ForwardOutput,
    Int32Array,
    Limits,
    Staging,
)
from engine.models.offload import Offloaded
from engine.models.registry import CausalLM
from engine.ops.attention.device import DecodePlan, DecodeStep, DeviceAttention, MixedStep, decode_inputs
from engine.ops.pooling import Pooler, pooled_chunks
from engine.ops.sampling.device import WORDS, sample
from engine.ops.sampling.device_extras import DeviceExtras, allow, figures_of, prompt_figures, prompt_logprobs
from engine.ops.skinny import Blocks
from engine.request import Pooling

logger = logging.getLogger("oneloop.cuda")

# Every array of the staging arena starts on a multiple of this many bytes.
ALIGN = 64
# Graphs wait this long for the device to be idle before they are captured.
IDLE_SECONDS = 0.02


@dataclass(slots=True, eq=False)
class CudaHandle:
    """A launched step. keep: tensors that must outlive the device's work on it.

    draw: set while its sampling waits for masks. downloads: (to, from) beside the tokens; readers: what puts them into
    the output.
    """

    step: int
    num_rows: int
    side: Side
    error: Exception | None = None
    waited: bool = False
    draw: Callable[[], None] | None = None
    keep: list[Tensor] = field(default_factory=list)
    downloads: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    readers: list[Callable[[ForwardOutput], object]] = field(default_factory=list)


class PinnedArena:
    """One block of pinned memory that the arrays of a Staging are cut from, so that one copy uploads them all."""

    def __init__(self, layer: DeviceLayer, num_bytes: int) -> None:
        self._layer = layer
        self.memory = layer.pinned(num_bytes)
        self._bytes: npt.NDArray[np.uint8] = self.memory.numpy()
        self._used = 0

    def allocate(self, length: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """An `Allocator`. What no longer fits (a grown table diff) becomes pinned memory of its own."""
        size = length * dtype.itemsize
        start, end = self._used, self._used + size
        if end > len(self._bytes):
            return self._layer.pinned(size).numpy().view(dtype)
        self._used = -(-end // ALIGN) * ALIGN
        return self._bytes[start:end].view(dtype)

    def offset_of(self, array: npt.NDArray[Any]) -> int:
        """In bytes from the start of the arena."""
        offset = int(array.ctypes.data - self._bytes.ctypes.data)
        assert 0 <= offset < len(self._bytes)
        return offset

    @staticmethod
    def size_for(limits: Limits) -> int:
        sizes: list[int] = []

        def count(length: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
            sizes.append(-(-length * dtype.itemsize // ALIGN) * ALIGN)
            return np.zeros(length, dtype)

        Staging(limits, count)
        return sum(sizes)


class Side:
    """One of the two sets of step buffers: host staging, its image on the device, metadata, results, events."""

    def __init__(self, layer: DeviceLayer, limits: Limits, parity: int) -> None:
        self.parity = parity
        self._layer = layer
        rows = limits.max_num_seqs
        self.arena = PinnedArena(layer, PinnedArena.size_for(limits))
        self.staging = Staging(limits, self.arena.allocate)
        self.block = layer.zeros((self.arena.memory.numel(),), torch.uint8)
        self.row_slot = self._image(self.staging.row_slot)
        self.row_start = self._image(self.staging.row_start)
        self.token_ids = self._image(self.staging.token_ids)
        self.table_index = self._image(self.staging.table_index)
        self.table_page = self._image(self.staging.table_page)
        self.sampling_slot = self._image(self.staging.sampling_slot)
        self.sampling = self._image(self.staging.sampling).view(rows, WORDS)
        # Staging may replace these two by larger ones; graphs go on reading the first.
        self.first_index, self.first_page = self.staging.table_index, self.staging.table_page
        self.metadata = PagedMetadata(limits)
        self.meta_host = layer.pinned(4 * (2 * limits.max_num_batched_tokens + 16 * (rows + 4) + limits.num_pages))
        self.meta_host = self.meta_host.view(torch.int32)
        self.meta = layer.zeros((self.meta_host.numel(),), torch.int32)
        self.out = layer.zeros((rows,), torch.int32)
        self.result_host = layer.pinned(4 * rows).view(torch.int32)
        self.result: Int32Array = self.result_host.numpy()
        self.uploaded, self.computed, self.done = layer.event(), layer.event(), layer.event()

    def _image(self, array: npt.NDArray[Any]) -> Tensor:
        """The place of a staging array in the block, as int32."""
        offset = self.arena.offset_of(array)
        return self.block[offset : offset + array.nbytes].view(torch.int32)

    def end_of(self, array: npt.NDArray[Any], count: int) -> int:
        """Bytes of the arena up to `count` entries of an array."""
        return self.arena.offset_of(array) + count * array.dtype.itemsize

    def write_meta(self, parts: Sequence[npt.NDArray[Any]], upload: Any) -> tuple[list[slice], int]:
        """Lay arrays into the metadata, each on a multiple of 16 bytes: where they are, and the length in words.

        Kernels are compiled anew for pointers that are not so aligned.
        """
        sizes = [-(-len(part) // 4) * 4 for part in parts]
        starts = [0, *np.cumsum(sizes).tolist()]
        with self._layer.on(upload):
            self.reserve_meta(starts[-1])
        host = self.meta_host.numpy()
        cuts = [slice(start, start + len(part)) for start, part in zip(starts, parts, strict=False)]
        for cut, part in zip(cuts, parts, strict=True):
            host[cut] = part
        return cuts, starts[-1]

    def reserve_meta(self, length: int) -> None:
        if length > self.meta_host.numel():
            capacity = max(length, 2 * self.meta_host.numel())
            self.meta_host = self._layer.pinned(4 * capacity).view(torch.int32)
            self.meta = self._layer.zeros((capacity,), torch.int32)


class Waiter:
    """The thread that blocks on events, so that the loop does not."""

    def __init__(self, layer: DeviceLayer) -> None:
        self._layer = layer
        self._jobs: queue.SimpleQueue[tuple[Any, asyncio.Future[None], asyncio.AbstractEventLoop] | None] = (
            queue.SimpleQueue()
        )
        self._thread: threading.Thread | None = None

    async def wait(self, event: Any) -> None:
        """Until the event is done. Raises what the device raised."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="cuda-waiter", daemon=True)
            self._thread.start()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        self._jobs.put((event, future, loop))
        await future

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            event, future, loop = job
            error: BaseException | None = None
            try:
                self._layer.synchronize(event)
            except BaseException as caught:
                error = caught
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(_settle, future, error)

    def close(self) -> None:
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join(timeout=30.0)  # a device that hangs must not keep the process
            self._thread = None


def _settle(future: asyncio.Future[None], error: BaseException | None) -> None:
    if future.done():  # its waiter was cancelled
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)


class CUDAExecutor:
    """An `Executor` on one device. See the module.

    attention: owns the KV memory, limits.num_pages + 1 pages. cuda_graph: lazy, start or off (cuda_graph.py).
    load: reads the model from a directory, None for where `model` came from.
    """

    def __init__(
        self,
        model: CausalLM,
        limits: Limits,
        layer: DeviceLayer,
        attention: DeviceAttention,
        *,
        cuda_graph: str = "lazy",
        load: Callable[[Path | None], CausalLM] | None = None,
    ) -> None:
        self.limits = limits
        self.layer = layer
        self.model = model
        self.attention = attention
        self.graphs = GraphCache(layer, cuda_graph, limits.max_num_seqs, limits.max_pages_per_seq)
        self.num_steps = 0
        with layer.may_block():
            self._sides = self._make_sides()
            # State by slot, on the device.
            self._page_table = layer.zeros((limits.num_slots, limits.max_pages_per_seq), torch.int32)
            self._last_token = layer.zeros((limits.num_slots,), torch.int32)
            self._sampling = layer.zeros((limits.num_slots, WORDS), torch.int32)
            self._compute, self._upload, self._download = layer.stream(), layer.stream(), layer.stream()
            layer.synchronize_all()
            with layer.on(self._compute):
                attention.settle()
            layer.synchronize_all()
        self._flat_table = self._page_table.view(-1)
        self._extras = DeviceExtras(limits, layer.zeros)
        self._pooler = Pooler()
        self.staging: tuple[Staging, Staging] = (self._sides[0].staging, self._sides[1].staging)
        # What the host plans from; the device has its own image of all of it.
        self._tables = SlotTables(limits)
        self._filters: npt.NDArray[np.bool_] = np.zeros(limits.num_slots, np.bool_)
        # Logits of an open step, which draws before the next begins; and a step that came before the masks of the one
        # ahead of it.
        self._open: Tensor | None = None
        self._undrawn: CudaHandle | None = None
        self._deferred: tuple[ForwardInput, CudaHandle] | None = None
        self._waiter = Waiter(layer)
        self._in_flight = 0
        self._lost: DeviceLostError | None = None
        self._closed = False
        self._idle_timer: asyncio.TimerHandle | None = None
        self._few: list[dict[int, Blocks]] = []
        self._profiler: Any = None
        self._profile_dir: Path | None = None
        self._load = load
        self._offloaded: Offloaded | None = None
        # Held while memory moves, on another thread: no graph may be captured meanwhile.
        self._moving = threading.Lock()

    def _make_sides(self) -> tuple[Side, Side]:
        return Side(self.layer, self.limits, 0), Side(self.layer, self.limits, 1)

    # ---- the protocol

    def submit(self, forward_input: ForwardInput) -> CudaHandle:
        """Launch a step; see `Executor.submit`."""
        assert not self._closed, "submit after close"
        side = self._sides[forward_input.step & 1]
        assert forward_input.staging is side.staging, "the staging sets must alternate"
        assert self._in_flight < 2, "a third step in flight, with two staging sets"
        handle = CudaHandle(forward_input.step, forward_input.num_rows, side, error=self._lost)
        self._in_flight += 1
        self.num_steps += 1
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None
        if self._undrawn is not None:
            # Its decode rows read what that step has yet to draw.
            self._deferred = (forward_input, handle)
        else:
            self._start(forward_input, handle)
        return handle

    def _start(self, forward_input: ForwardInput, handle: CudaHandle) -> None:
        """Launch a step; never raises."""
        if self._lost is None:
            try:
                with self.layer.range("launch"):
                    self._launch(forward_input, handle.side, handle)
            except Exception as error:
                handle.error, handle.draw = self._judge(error), None
        if handle.draw is not None:
            self._undrawn = handle
        else:
            self._end(handle)

    def _end(self, handle: CudaHandle) -> None:
        """A failed step too is done only when the device has finished with its staging set."""
        if self._lost is None:
            try:
                self._finish(handle.side, handle)
            except Exception as error:
                handle.error = self._judge(error)

    def provide_masks(self, handle: StepHandle) -> None:
        """See `Executor.provide_masks`."""
        assert isinstance(handle, CudaHandle)
        if handle is not self._undrawn:  # it has failed, or it is deferred: then they are there when it starts
            return
        draw, handle.draw, self._undrawn = handle.draw, None, None
        assert draw is not None
        if self._lost is None:
            try:
                with self.layer.on(self._compute):
                    draw()
            except Exception as error:
                handle.error = self._judge(error)
        self._end(handle)
        if self._deferred is not None:
            (forward_input, later), self._deferred = self._deferred, None
            self._start(forward_input, later)

    async def wait(self, handle: StepHandle) -> ForwardOutput:
        """Wait for a step; see `Executor.wait`."""
        assert isinstance(handle, CudaHandle) and not handle.waited, "steps are waited for once, in order"
        handle.waited = True
        assert handle.draw is None, "a step is waited for before it has its masks"
        side = handle.side
        try:
            if self._lost is None and not self.layer.is_done(side.done):
                await self._waiter.wait(side.done)
        except Exception as error:
            self._lose(error)
        self._in_flight -= 1
        handle.keep.clear()
        handle.downloads.clear()
        if self._lost is not None:
            raise self._lost
        if handle.error is not None:
            raise handle.error
        if not self._in_flight and self.graphs.next_wanted() is not None:
            self._idle_timer = asyncio.get_running_loop().call_later(IDLE_SECONDS, self._capture_when_idle)
        output = ForwardOutput(side.result[: handle.num_rows], handle.step)
        for read in handle.readers:
            read(output)
        return output

    def close(self) -> None:
        """Finish what is launched, then free the device. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        self._waiter.close()
        if self._profiler is not None:
            self.stop_profile()
        with self.layer.may_block():
            if self._lost is None:
                try:
                    self.layer.synchronize_all()
                except Exception as error:
                    logger.error("the device failed while it was closed: %s", error)
        self.graphs.clear()

    # ---- memory that comes and goes

    def sleep(self, level: int) -> None:
        """See `Executor.sleep`."""
        with self._released():
            if level == 2:
                self._reader()  # or it would never wake up
                del self.model
            else:
                self._offloaded = Offloaded(self.model)
            self.attention.release()

    def wake_up(self, directory: Path | None = None) -> None:
        """See `Executor.wake_up`."""
        with self._released():
            try:
                if self._offloaded is not None:
                    self._offloaded.restore()
                elif not hasattr(self, "model"):
                    self.model = self._with_products(self._reader()(directory))
                self.attention.allocate()
            except torch.OutOfMemoryError as error:
                self.attention.release()
                raise StartupError(f"no device memory: {str(error).splitlines()[0]}") from error
            self._offloaded = None

    def load_weights(self, directory: Path) -> None:
        """See `Executor.load_weights`. The KV cache makes room meanwhile, so that both models fit."""
        load = self._reader()
        with self._released():
            self.attention.release()
            self.layer.free_memory()
            problem: Exception | None = None
            try:
                self.model = self._with_products(load(directory))
            except Exception as error:
                problem = error.with_traceback(None)  # its frames hold what was half loaded
            gc.collect()
            self.layer.free_memory()
            self.attention.allocate()
            if isinstance(problem, torch.OutOfMemoryError):
                raise StartupError(f"no device memory for two models: {str(problem).splitlines()[0]}")
            if problem is not None:
                raise problem

    def _reader(self) -> Callable[[Path | None], CausalLM]:
        if self._load is None:
            raise StartupError("this executor has nowhere to read weights from")
        return self._load

    @contextlib.contextmanager
    def _released(self) -> Iterator[None]:
        """The device idle and without graphs, which hold addresses; they are captured again as they are needed."""
        assert not self._in_flight, "memory moves under a step"
        with self._moving, self.layer.may_block():
            self.layer.synchronize_all()
            self.graphs.clear()
            self._open = None
            try:
                yield
            finally:
                gc.collect()
                self.layer.synchronize_all()
                self.layer.free_memory()  # gives what nobody uses back to the driver

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

    # ---- a step

    def _launch(self, forward_input: ForwardInput, side: Side, handle: CudaHandle) -> None:
        self._tables.apply(forward_input)
        self._note_filters(forward_input)
        rows = forward_input.num_rows
        slots = side.staging.row_slot[:rows]
        draw = "filtered" if self._filters[slots].any() else "plain"
        masks = forward_input.masks
        is_open = masks is not None or forward_input.extras or (self._extras.count and self._extras.has[slots].any())
        if forward_input.num_decode_rows == rows:
            logits = self._launch_decode(forward_input, side, handle, "open" if is_open else draw)
        else:
            logits = self._launch_mixed(forward_input, side, handle, "open" if is_open else draw)
        if logits is None:
            return

        def draw_open() -> None:
            self._draw_open(forward_input, handle, logits, filtered=draw == "filtered")

        if masks is None or masks.is_ready:
            with self.layer.on(self._compute):
                draw_open()
        else:
            handle.draw = draw_open

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

    def _note_filters(self, forward_input: ForwardInput) -> None:
        count = forward_input.num_sampling_diffs
        if count:
            staging = forward_input.staging
            rows = staging.sampling[:count]
            filters = (rows["top_k"] > 0) | (rows["top_p"] < 1.0) | (rows["min_p"] > 0.0)
            self._filters[staging.sampling_slot[:count]] = filters & (rows["temperature"] > 0.0)

    def _send(self, side: Side, num_bytes: int, num_meta: int = 0) -> None:
        """Upload the used part of the staging arena, and of the metadata."""
        layer = self.layer
        with layer.on(self._upload):
            # The step before last has read this image; it is done, unless it was one that warmed up a graph.
            layer.wait(side.computed)
            layer.upload(side.block[:num_bytes], side.arena.memory[:num_bytes])
            if num_meta:
                layer.upload(side.meta[:num_meta], side.meta_host[:num_meta])
            layer.record(side.uploaded)

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
        ends = np.cumsum([len(array) for array in arrays]).tolist()
        size = max(1, ends[-1])
        pinned = layer.pinned(4 * size).view(torch.int32)
        host = pinned.numpy()
        for array, end in zip(arrays, ends, strict=True):
            host[end - len(array) : end] = array.view(np.int32)
        with layer.on(self._upload):
            sent = layer.zeros((size,), torch.int32)
            layer.upload(sent, pinned)
            layer.record(side.uploaded)
        layer.wait(side.uploaded)
        handle.keep += [pinned, sent]
        parts = [sent[end - len(array) : end] for array, end in zip(arrays, ends, strict=True)]
        return [
            part.view(torch.float32) if array.dtype == np.float32 else part
            for array, part in zip(arrays, parts, strict=True)
        ]

    # ---- decode

    def _launch_decode(
        self, forward_input: ForwardInput, side: Side, handle: CudaHandle, draw: str
    ) -> Callable[[], Tensor] | None:
        """How an open step's logits are had on the device; None where the step draws by itself."""
        layer, staging, rows = self.layer, side.staging, forward_input.num_rows
        count, changed = forward_input.num_table_diffs, forward_input.num_sampling_diffs
        longest = int(staging.row_start[:rows].max()) + 1
        key = self.graphs.key(rows, -(-longest // self.limits.page_size), side.parity, draw)
        size = key.size
        inside = self._pad(side, rows, size, count)
        num_meta, plan = self._decode_plan(forward_input, side, size) if self.attention.decode_needs_plan else (0, None)
        end = side.end_of(side.first_page, max(inside, size))
        if changed:
            end = side.end_of(staging.sampling, changed)
        self._send(side, end, num_meta)
        with layer.on(self._compute):
            layer.wait(side.uploaded)
            if changed or count > min(inside, size):
                # More than a graph has room for. It applies its share again, which changes nothing.
                self._apply_diffs(forward_input, side, handle)
            if plan is not None:
                self.attention.plan_decode(plan, size, key.width, side.parity)
            graph = self.graphs.get(key)
            if graph is None and self.graphs.note_use(key):
                graph = self._capture(key)
            if graph is not None:
                self.graphs.replay(graph)
            else:
                self._prepare(key)
                layer.launch(lambda: self._decode(key))
        room = self._open
        return (lambda: room[:rows]) if room is not None and draw == "open" else None

    def _prepare(self, key: GraphKey) -> None:
        """Memory that steps of a key need beside their own, and that graphs hold on to; compute stream."""
        self.attention.prepare_decode(key.size, key.width)
        if key.draw == "open" and self._open is None:
            # For all graphs: each would keep its own.
            self._open = self.layer.zeros((self.limits.max_num_seqs, self.limits.vocab_size), torch.float32)

    @staticmethod
    def _pad(side: Side, rows: int, size: int, num_diffs: int) -> int:
        """Fill up a decode batch: rows of slot 0, and changes of its first page-table entry to what it is.

        Returns how many of the table diffs stand where graphs look for them.
        """
        staging = side.staging
        staging.row_slot[rows:size] = NULL_SLOT
        staging.row_start[rows:size] = 0
        inside = num_diffs if staging.table_index is side.first_index else 0
        side.first_index[inside:size] = 0
        side.first_page[inside:size] = NULL_PAGE
        return inside

    def _decode(self, key: GraphKey) -> None:
        """The whole of a decode step on the device. Shapes depend on the key alone."""
        size, width, parity, draw = key
        side, page_size = self._sides[parity], self.limits.page_size
        with torch.inference_mode():
            positions = side.row_start[:size]
            slots, token_ids, kv_len, kv_slots, tables = decode_inputs(
                self._page_table,
                self._last_token,
                side.row_slot[:size],
                positions,
                side.table_index[:size],
                side.table_page[:size],
                width,
                page_size,
            )
            attention = self.attention.decode(DecodeStep(positions, kv_slots, tables, kv_len, parity))
            hidden = self.model.forward(token_ids, positions, attention)
            logits = self.model.logits(hidden)
            if draw == "open":
                assert self._open is not None
                self._open[:size].copy_(logits)
                return
            params, filters = self._sampling.index_select(0, slots), self.attention.filters
            tokens = sample(logits, params, kv_len, filtered=draw == "filtered", filters=filters)
            self._last_token.index_copy_(0, slots, tokens)
            side.out[:size].copy_(tokens)

    def _decode_plan(self, forward_input: ForwardInput, side: Side, size: int) -> tuple[int, DecodePlan]:
        """Host metadata of a decode step, padded to `size` rows of one page. Returns its length in words."""
        rows, metadata = forward_input.num_rows, side.metadata
        metadata.build(forward_input, self._tables)
        pages = len(metadata.kv_indices)
        total = 2 * size + 1 + pages + (size - rows)
        with self.layer.on(self._upload):
            side.reserve_meta(total)
        host = side.meta_host.numpy()
        host[: rows + 1] = metadata.kv_indptr
        host[rows + 1 : size + 1] = pages + np.arange(1, size - rows + 1)
        host[size + 1 : size + 1 + rows] = metadata.last_page_len
        host[size + 1 + rows : 2 * size + 1] = 1
        host[2 * size + 1 : 2 * size + 1 + pages] = metadata.kv_indices
        host[2 * size + 1 + pages : total] = NULL_PAGE
        plan = DecodePlan(
            side.meta_host[: size + 1], side.meta_host[size + 1 : 2 * size + 1], side.meta[2 * size + 1 : total]
        )
        return total, plan

    # ---- open steps: drawn by operations of their own

    def _draw_open(
        self, forward_input: ForwardInput, handle: CudaHandle, logits: Callable[[], Tensor], *, filtered: bool
    ) -> None:
        """Launch the sampling of a step whose logits are there; compute stream."""
        layer, side, extras = self.layer, handle.side, self._extras
        staging, num_rows = side.staging, forward_input.num_rows
        rows = np.flatnonzero(staging.row_samples[:num_rows])
        slots_host = staging.row_slot[:num_rows][rows]
        lengths = (staging.row_start + staging.row_len)[:num_rows][rows]

        def send(arrays: Sequence[npt.NDArray[Any]]) -> list[Tensor]:
            return self._send_arrays(arrays, handle)

        plan = extras.plan(slots_host, send)
        where, slots, positions = send([rows.astype(np.int32), slots_host, lengths.astype(np.int32)])
        masks, masked, bits = forward_input.masks, None, None
        if masks is not None:
            index = np.searchsorted(rows, masks.rows).astype(np.int32)
            masked, bits = send([index, masks.bits.reshape(-1).view(np.int32)])
            bits = bits.view(len(masks.rows), -1)
        figures = asked = None
        if plan is not None and len(plan.logprob_rows):
            figures = layer.zeros((len(plan.logprob_rows), plan.figures()), torch.int32)
            (asked,) = send([plan.logprob_rows.astype(np.int32)])
            self._bring(
                handle,
                figures,
                lambda output, host: setattr(output, "logprobs", extras.step_logprobs(host, plan, rows)),
            )

        def work() -> None:
            with torch.inference_mode():
                raw, wide = logits(), slots.long()
                x = raw if plan is None else extras.adjust(raw, wide, plan)
                if masked is not None and bits is not None:
                    x = allow(x, masked, bits)
                params, filters = self._sampling.index_select(0, wide), self.attention.filters
                tokens = sample(x, params, positions, filtered=filtered, filters=filters)
                if plan is not None:
                    extras.note(wide, tokens)
                if figures is not None and asked is not None and plan is not None:
                    index = asked.long()
                    figures.copy_(figures_of(raw.index_select(0, index), tokens.index_select(0, index), plan.num_top))
                self._last_token.index_copy_(0, wide, tokens)
                side.out[:num_rows].fill_(FUTURE_TOKEN)
                side.out.index_copy_(0, where.long(), tokens)

        layer.launch(work)

    def _bring(self, handle: CudaHandle, source: Tensor, read: Callable[[ForwardOutput, Int32Array], object]) -> None:
        """Download int32 [n, k] with the step's tokens and let `read` put it into the output."""
        host = self.layer.pinned(4 * source.numel()).view(torch.int32).view(source.shape)
        handle.keep += [source, host]
        handle.downloads.append((host, source))
        array: Int32Array = host.numpy()
        handle.readers.append(lambda output: read(output, array))

    # ---- graphs

    def _capture(self, key: GraphKey) -> Any:
        """Record the decode step of a key; compute stream."""
        self._prepare(key)
        with self.layer.range(f"capture {key.size}"):
            return self.graphs.capture(key, lambda: self._decode(key))

    def _warm_up(self, key: GraphKey, *, capture: bool) -> None:
        """Run a decode step of padding rows, then record it. Nothing of the key's parity may be in flight."""
        layer, side = self.layer, self._sides[key.parity]
        with layer.on(self._compute):
            layer.launch(side.block.zero_)
            if self.attention.decode_needs_plan:
                self._plan_padding(side, key)
            self._prepare(key)
            layer.launch(lambda: self._decode(key))
            if capture:
                self._capture(key)
            layer.record(side.computed)

    def _plan_padding(self, side: Side, key: GraphKey) -> None:
        indptr, ones = torch.arange(key.size + 1, dtype=torch.int32), torch.ones(key.size, dtype=torch.int32)
        indices = side.meta[: key.size]
        self.layer.launch(indices.zero_)
        self.attention.plan_decode(DecodePlan(indptr, ones, indices), key.size, key.width, key.parity)

    def _capture_when_idle(self) -> None:
        """Called by the loop a while after the last step. One graph at a time, then the loop gets its turn."""
        self._idle_timer = None
        key = self.graphs.next_wanted()
        if key is None or self._in_flight or self._lost is not None or self._closed:
            return
        if not self._moving.acquire(blocking=False):
            return
        try:
            self._warm_up(key, capture=True)
        except Exception as error:
            self._judge(error)
            self.graphs.give_up(key, error)
        finally:
            self._moving.release()
        if self._lost is None and self.graphs.next_wanted() is not None:
            self._idle_timer = asyncio.get_running_loop().call_later(0.0, self._capture_when_idle)

    def choose_products(self) -> tuple[int, int]:
        """See cuda_products.py; before anything is captured. Blocks."""
        with self.layer.may_block(), self.layer.on(self._compute):
            found = choose_products(self.model.linears, self.layer)
            self.layer.synchronize_all()
        self._few = [linear.few for linear in self.model.linears]
        return found

    def _with_products(self, model: CausalLM) -> CausalLM:
        """Another model of the same shapes, with what was found faster for the first one."""
        for linear, few in zip(model.linears, self._few, strict=False):
            linear.few = few
        return model

    def decode_once(self) -> None:
        """A decode step of one padding row: its kernels are built and loaded before a client waits for them. Blocks."""
        with self.layer.may_block():
            self._warm_up(self.graphs.key(1, 1, 0, "plain"), capture=False)
            self.layer.synchronize_all()

    def capture_at_start(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Mode start: capture what is commonly used. Blocks."""
        keys = list(self.graphs.at_start())
        with self.layer.may_block():
            for number, key in enumerate(keys):
                self._warm_up(key, capture=True)
                if progress is not None:
                    progress(number + 1, len(keys))
            self.layer.synchronize_all()

    # ---- steps with prompts

    def _launch_mixed(
        self, forward_input: ForwardInput, side: Side, handle: CudaHandle, draw: str
    ) -> Callable[[], Tensor] | None:
        """See `_launch_decode`."""
        layer, staging = self.layer, side.staging
        rows, tokens, decodes = forward_input.num_rows, forward_input.num_tokens, forward_input.num_decode_rows
        metadata = side.metadata
        metadata.build(forward_input, self._tables)
        sampled = np.flatnonzero(staging.row_samples[:rows])
        parts: list[npt.NDArray[Any]] = [
            metadata.positions,
            metadata.kv_slots,
            metadata.qo_indptr,
            metadata.kv_indptr,
            metadata.last_page_len,
            metadata.kv_indices,
            sampled,
            metadata.qo_indptr[1:][sampled] - 1,
            staging.row_slot[:rows][sampled],
            metadata.kv_len[sampled],
            metadata.kv_len,
        ]
        cuts, total = side.write_meta(parts, self._upload)
        inside = staging.table_index is side.first_index
        end = side.end_of(side.first_page, forward_input.num_table_diffs if inside else 0)
        if forward_input.num_sampling_diffs:
            end = side.end_of(staging.sampling, forward_input.num_sampling_diffs)
        self._send(side, max(end, side.end_of(staging.token_ids, tokens)), total)
        meta, pinned = side.meta, side.meta_host
        positions, slots32, indices, where, last, sample_slots, sample_at = (
            meta[cuts[part]] for part in (0, 1, 5, 6, 7, 8, 9)
        )
        with layer.on(self._compute):
            layer.wait(side.uploaded)
            self._apply_diffs(forward_input, side, handle)
            kv_slots = slots32  # widened on the device
            on_host = (pinned[cuts[part]] for part in (2, 3, 4, 10))
            step = MixedStep(positions, kv_slots, indices, *on_host, side.parity)
            attention = self.attention.mixed(step)

            chunks = []
            for row, first, at, targets, k in self._extras.prompts(forward_input):
                (sent,) = self._send_arrays([targets], handle)
                chunks.append((first, sent, self._prompt_out(handle, row, at, targets, k), k))
            pooled = pooled_chunks(forward_input)
            vectors = [self._vector_out(handle, entry.pooling) for entry in forward_input.pooled if entry.ends]
            found: list[Tensor] = []

            def work() -> None:
                with torch.inference_mode():
                    step.kv_slots = slots32.long()
                    token_ids = side.token_ids[:tokens]
                    if decodes:
                        known = self._last_token.index_select(0, side.row_slot[:decodes].long())
                        token_ids[:decodes].copy_(known)
                    hidden = self.model.forward(token_ids, positions, attention)
                    for first, targets, out, k in chunks:
                        part = hidden[first : first + len(targets)]
                        prompt_figures(part, self.model.logits, targets, k, self.limits.vocab_size, out)
                    for out, vector in zip(vectors, self._pooler.run(pooled, hidden, self.model.logits), strict=True):
                        out.copy_(vector)
                    side.out[:rows].fill_(FUTURE_TOKEN)
                    if not len(sampled):
                        return
                    logits = self.model.logits(hidden.index_select(0, last.long()))
                    if draw == "open":
                        found.append(logits)
                        return
                    params = self._sampling.index_select(0, sample_slots.long())
                    filters = self.attention.filters
                    tokens_out = sample(logits, params, sample_at, filtered=draw == "filtered", filters=filters)
                    self._last_token.index_copy_(0, sample_slots.long(), tokens_out)
                    side.out.index_copy_(0, where.long(), tokens_out)

            layer.launch(work)
        return found.pop if draw == "open" and len(sampled) else None

    def _prompt_out(self, handle: CudaHandle, row: int, first: int, targets: Int32Array, k: int) -> Tensor:
        """Where the log-probabilities of a prompt chunk go on the device; they come with the step's tokens."""
        out = self.layer.zeros((len(targets), 2 + 2 * k), torch.int32)
        self._bring(
            handle, out, lambda output, host: output.prompt_logprobs.append(prompt_logprobs(row, first, host, k))
        )
        return out

    def _vector_out(self, handle: CudaHandle, pooling: Pooling) -> Tensor:
        """Where a prompt's vector goes on the device, float32; it comes with the step's tokens."""
        width = len(pooling.token_ids) if pooling.kind == "logprobs" else self.model.config.hidden_size
        out = self.layer.zeros((1, width), torch.int32)
        self._bring(handle, out, lambda output, host: output.pooled.append(host[0].view(np.float32).copy()))
        return out[0].view(torch.float32)

    # ---- profiling

    @property
    def is_profiling(self) -> bool:
        return self._profiler is not None

    def start_profile(self, directory: str | Path) -> None:
        """Record a torch profiler trace until `stop_profile`; nothing happens while one is running."""
        if self._profiler is not None:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.layer.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profile_dir = Path(directory)
        self._profile_dir.mkdir(parents=True, exist_ok=True)
        self._profiler = torch.profiler.profile(activities=activities)
        self._profiler.start()

    def stop_profile(self) -> Path | None:
        """Write the trace and return its path; None where nothing was recorded. Blocks while it writes."""
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return None
        assert self._profile_dir is not None
        with self.layer.may_block():
            profiler.stop()
        path = self._profile_dir / f"oneloop-{time.strftime('%Y%m%d-%H%M%S')}-{self.num_steps}.json"
        profiler.export_chrome_trace(str(path))
        return path

    # ---- start

    def run_worst_case(self) -> None:
        """One step of the whole token budget in as many rows as there are, all of which sample. Blocks."""
        limits = self.limits
        rows = min(limits.max_num_seqs, limits.num_pages)
        most = min(limits.max_model_len, limits.num_pages // rows * limits.page_size)
        handle = self.submit(self.prompt_step(0, rows, max(1, min(limits.max_num_batched_tokens // rows, most))))
        with self.layer.may_block():
            self.layer.synchronize_all()
        self._in_flight -= 1
        if handle.error is not None:
            raise handle.error

    def prompt_step(self, step: int, rows: int, length: int) -> ForwardInput:
        """A step of `rows` new prompts that are `length` tokens long and sample in the hungriest way."""
        limits, staging = self.limits, self.staging[step & 1]
        pages = -(-length // limits.page_size)
        assert rows * pages <= limits.num_pages
        staging.reserve_table_diff(rows * pages)
        index = np.arange(rows, dtype=np.int32)
        staging.row_slot[:rows] = index + 1
        staging.row_start[:rows] = 0
        staging.row_len[:rows] = length
        staging.row_samples[:rows] = not self.model.config.headless
        staging.token_ids[: rows * length] = 0
        staging.qo_indptr[: rows + 1] = np.arange(rows + 1) * length
        entry = np.arange(rows * pages, dtype=np.int32)
        staging.table_index[: rows * pages] = (entry // pages + 1) * limits.max_pages_per_seq + entry % pages
        staging.table_page[: rows * pages] = entry + 1
        staging.sampling_slot[:rows] = index + 1
        staging.sampling[:rows] = np.zeros((), staging.sampling.dtype)
        staging.sampling["temperature"][:rows] = 1.0
        staging.sampling["top_p"][:rows] = 0.9
        return ForwardInput(step, staging, rows, 0, rows * length, rows * pages, rows)

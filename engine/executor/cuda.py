"""CUDAExecutor: steps on a GPU. Launched from the loop thread, which never waits for the device.

Three streams: compute, and one for copies each way (a small upload must not queue behind a download that waits for
the step before it). Everything of a step exists twice and alternates by the step's parity: pinned staging, its image
on the device, metadata, sampled tokens. One waiter thread sleeps on events and wakes the loop.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.config import StartupError
from engine.executor.base import DeviceMemory, StepHandle
from engine.executor.cuda_adapters import CHAIN, DeviceAdapters
from engine.executor.cuda_buffers import CudaHandle, Side
from engine.executor.cuda_device import DeviceLayer
from engine.executor.cuda_drafter import Drafts
from engine.executor.cuda_drafts import DraftSteps
from engine.executor.cuda_draw import OpenSteps
from engine.executor.cuda_group import RankGroup
from engine.executor.cuda_memory import MovingMemory
from engine.executor.cuda_mixed import MixedSteps
from engine.executor.cuda_pages import LAYOUT_VERSION, DevicePages, PageCopier
from engine.executor.cuda_waiter import Waiter
from engine.forward import FUTURE_TOKEN, NO_NUMBERS, ForwardInput, ForwardOutput, Int32Array, Limits
from engine.groups import name_of
from engine.lora.reader import AddUp
from engine.lora.words import AdapterError, AdapterWeights
from engine.models.offload import Offloaded, Weighed
from engine.models.parts.decoder import CausalLM
from engine.ops.attention.device import DeviceAttention
from engine.speculation.base import Proposer

logger = logging.getLogger("oneloop.cuda")

# Graphs wait this long for the device to be idle before they are captured.
IDLE_SECONDS = 0.02


class CUDAExecutor(MovingMemory, MixedSteps, OpenSteps, DraftSteps):
    """An `Executor` on one device. See the module.

    attention: owns the KV memory, limits.num_pages + 1 pages. cuda_graph: lazy, start or off (cuda_graph.py).
    load: reads the model from a directory, None for where `model` came from. proposer: what drafts, where
    limits.max_draft_tokens is not 0; drafts: what drafts on the device, behind it. adapters: where the model has places
    for any. group: of ranks, where this is one.
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
        proposer: Proposer | None = None,
        drafts: Drafts | None = None,
        adapters: DeviceAdapters | None = None,
        group: RankGroup | None = None,
    ) -> None:
        super().__init__(model, limits, layer, attention, cuda_graph)
        if group is not None:
            self._group = group
            self.graphs.agree = self.pieces.agree = group.agreed
        self._adapters = adapters
        self._copier: PageCopier | None = None
        if adapters is not None:
            self.graphs.families = (False, True)
            self.pieces.adapting = functools.partial(adapters.used, CHAIN)
        if drafts is not None:
            self._draft_with(drafts)
        if limits.max_draft_tokens:
            self._draft_by(proposer)
        # A step that came before the masks of the one ahead of it, or before the tokens that its drafts follow.
        self._undrawn: CudaHandle | None = None
        self._deferred: tuple[ForwardInput, CudaHandle] | None = None
        self._waiter = Waiter(layer)
        self._profiler: Any = None
        self._profile_dir: Path | None = None
        self._load = load
        self._offloaded: Offloaded | None = None
        self._weighed = Weighed()
        self._beside = threading.Condition()
        self._carried = weakref.WeakSet()

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
        if self._undrawn is not None or self._needs_tokens(forward_input):
            # Its decode rows read what that step has yet to draw.
            self._deferred = (forward_input, handle)
        else:
            self._start(forward_input, handle)
        return handle

    def _start(self, forward_input: ForwardInput, handle: CudaHandle) -> None:
        """Launch a step; never raises."""
        given, laid_out = forward_input, False
        if self._lost is None:
            try:
                with self.layer.range("launch"):
                    forward_input = self._with_drafts(forward_input, handle)
                    laid_out = True
                    self._launch(forward_input, handle.side, handle)
            except Exception as error:
                handle.error, handle.draw = self._judge(error), None
                self._lost_diffs = True
                # What it says of slots and adapters is said once, and later steps rest on it.
                if not laid_out:
                    self._tables.apply(given)
                    self._note_filters(given)
                    try:
                        self._move_states(given)
                    except Exception as second:
                        self._judge(second)
                if self._adapters is not None:
                    self._adapters.expect(given)
        if handle.draw is not None:
            self._undrawn = handle
        else:
            self._end(handle)

    def _end(self, handle: CudaHandle) -> None:
        """A failed step too is done only when the device has finished with its staging set."""
        if self._lost is None:
            try:
                if handle.error is not None:
                    # What it has uploaded still reads its staging, and nothing may have waited for that.
                    with self.layer.on(self._compute):
                        self.layer.wait(handle.side.uploaded)
                self._finish(handle.side, handle)
            except Exception as error:
                handle.error = self._judge(error)

    def unseen_drafts(self, handle: StepHandle) -> Awaitable[list[tuple[int, Int32Array]]] | None:
        """See Executor."""
        assert isinstance(handle, CudaHandle)
        return None if handle.early is None or handle.error is not None else self._see_drafts(handle)

    async def _see_drafts(self, handle: CudaHandle) -> list[tuple[int, Int32Array]]:
        try:
            if self._lost is None and not self.layer.is_done(handle.side.told):
                await self._waiter.wait(handle.side.told)
        except Exception as error:
            self._lose(error)
        return [] if self._lost is not None else self._drafts_seen(handle)

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
        if self._deferred is not None and not self._needs_tokens(self._deferred[0]):
            self._start_deferred()

    def _start_deferred(self) -> None:
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
        return self._settle(handle)

    def _settle(self, handle: CudaHandle) -> ForwardOutput:
        """What a step brought that the device is done with."""
        self._in_flight -= 1
        handle.keep.clear()
        handle.downloads.clear()
        try:
            return self._output_of(handle)
        finally:
            self._start_deferred()

    def _output_of(self, handle: CudaHandle) -> ForwardOutput:
        """What a step brought, or what it failed by."""
        if self._lost is not None:
            raise self._lost
        if handle.error is not None:
            self._forget_drafts(handle)
            raise handle.error
        if not self._in_flight and self.graphs.next_wanted() is not None:
            self._capture_later(IDLE_SECONDS)
        tokens = handle.side.result[: handle.num_rows]
        output = ForwardOutput(tokens, handle.step)
        for read in handle.readers:
            read(output)
        if tokens.min(initial=0) < FUTURE_TOKEN:
            broken = np.flatnonzero(tokens == NO_NUMBERS)
            output.broken += broken.tolist()
            tokens[broken] = 0
        if output.broken:
            self._cleanse(handle, output.broken)
        self._follow(handle, output)
        return output

    def _cleanse(self, handle: CudaHandle, rows: list[int]) -> None:
        """Take what is no number out of these rows' pages, before others have them: kernels read whole pages, and what
        lies behind a text counts with weight 0, which makes NaN of NaN. Behind a step in flight, which has these rows
        once more."""
        staging, page_size = handle.side.staging, self.limits.page_size
        try:
            with self.layer.on(self._compute):
                for row in rows:
                    slot, known = int(staging.row_slot[row]), int(staging.row_start[row] + staging.row_len[row])
                    tables = self._page_tables[:, slot, : -(-(known + 1) // page_size)]
                    self.layer.launch(functools.partial(self.attention.cleanse, tables))
                    if self._drafter is not None:
                        self._drafter.cleanse(tables)
        except Exception as error:
            self._judge(error)

    def read_adapter(self, path: Path) -> AdapterWeights:
        """See Executor."""
        return self._read_adapter(path)

    def _read_adapter(self, path: Path, add_up: AddUp | None = None) -> AdapterWeights:
        with self._reading_weights():
            model: CausalLM | None = getattr(self, "model", None)
            if self._adapters is None or model is None or self._offloaded is not None:
                raise AdapterError(
                    f"adapter {path.name!r}: the model was loaded without places for adapters, or sleeps"
                )
            return self._adapters.read(path, model.adapted, add_up)

    def drop_adapters(self, indices: Sequence[int]) -> None:
        """See Executor."""
        if self._adapters is not None and self._lost is None:
            self._adapters.drop(indices)
            try:
                with self.layer.may_block():
                    self.layer.free_memory()  # page-locked memory, too, which is kept otherwise
            except Exception as error:
                self._judge(error)

    def page_memory(self) -> DeviceMemory:
        """See Executor."""
        return self._own_pages()

    def state_memory(self) -> DeviceMemory | None:
        """See Executor."""
        return self._own_states()

    def _own_pages(self) -> DevicePages:
        own = self.attention.buffers
        # What drafts has keys and values of its own of the same tokens in the same pages.
        drafts = [] if self._drafter is None or not own else self._drafter.pools
        buffers = [buffer.view(torch.uint8).flatten(1) for buffer in (*own, *drafts) if buffer.shape[-1]]
        if not buffers:
            raise StartupError("this model keeps no keys and values, or sleeps")
        dtype, kv_dtype = (str(one).removeprefix("torch.") for one in (self.attention.dtype, self.attention.kv_dtype))
        layout = f"cuda {LAYOUT_VERSION} {dtype} in {kv_dtype} page {self.limits.page_size}"
        return self._handed_out(buffers, f"{layout}{name_of(self.limits.groups)}")

    def _own_states(self) -> DevicePages | None:
        if self._states is None:
            return None
        if not self.limits.num_snapshots:
            raise StartupError("there is no room for a snapshot of this model's recurrent state beside the pages")
        layout = f"cuda state {LAYOUT_VERSION} {str(self.attention.dtype).removeprefix('torch.')}"
        return self._handed_out([self._states.snapshots], layout)

    def _handed_out(self, parts: Sequence[torch.Tensor], layout: str) -> DevicePages:
        memory = DevicePages(self._page_copier(), parts, layout)
        self._carried.add(memory)
        return memory

    def _page_copier(self) -> PageCopier:
        if self._copier is None:
            self._copier = PageCopier(self.layer)
        return self._copier

    def close(self) -> None:
        """Finish what is launched, then free the device. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        self._waiter.close(waits=self._lost is None)
        if self._profiler is not None:
            self.stop_profile()
        with self.layer.may_block():
            if self._lost is None:
                try:
                    self.layer.synchronize_all()
                except Exception as error:
                    logger.error("the device failed while it was closed: %s", error)
        self.pieces.clear()
        self.graphs.clear()
        if self._drafter is not None:
            self._drafter.graphs.clear()

    # ---- a step

    def _launch(self, forward_input: ForwardInput, side: Side, handle: CudaHandle) -> None:
        self._tables.apply(forward_input)
        self._note_filters(forward_input)
        # Before all that may fail, and whatever becomes of the step: the cache counts on what it has saved.
        self._move_states(forward_input)
        if self._lost_diffs:
            self._send_tables(handle)
        if self._adapters is not None:
            with self.layer.on(self._compute):
                self._adapters.load(forward_input, handle)
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

    def _move_states(self, forward_input: ForwardInput) -> None:
        if (states := self._states) is not None and self._lost is None:
            with self.layer.on(self._compute):
                self.layer.launch(lambda: states.move(forward_input))

    def _note_filters(self, forward_input: ForwardInput) -> None:
        count = forward_input.num_sampling_diffs
        if count:
            staging = forward_input.staging
            rows = staging.sampling[:count]
            filters = (rows["top_k"] > 0) | (rows["top_p"] < 1.0) | (rows["min_p"] > 0.0)
            self._filters[staging.sampling_slot[:count]] = filters & (rows["temperature"] > 0.0)

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
        pages = limits.num_pages // len(limits.groups)
        rows = min(limits.max_num_seqs, pages)
        most = min(limits.max_model_len, pages // rows * limits.page_size)
        handle = self.submit(self.prompt_step(0, rows, max(1, min(limits.max_num_batched_tokens // rows, most))))
        with self.layer.may_block():
            self.layer.synchronize_all()
        self._in_flight -= 1
        if handle.error is not None:
            raise handle.error

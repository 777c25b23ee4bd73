"""What the CUDA executor needs of a device, as a seam: streams, events, copies, graphs, memory.

`CudaDevice` is torch.cuda. The tests put a device in its place whose streams run late and out of step
(tests/cuda/fake_device.py), so that an ordering which nobody asked for fails in CI. Loop thread, except `synchronize`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

logger = logging.getLogger("oneloop.cuda")

Stream = Any
Event = Any
Graph = Any
DEVICE_ERRORS = ("CUDA error", "CUBLAS_STATUS", "Triton Error [CUDA]")
OUT_OF_MEMORY = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "Triton Error [CUDA]: out of memory")
# torch's stubs leave streams, events and ranges untyped.
_cuda: Any = torch.cuda


class CaptureError(RuntimeError):
    """Operations that cannot be captured in a graph; the device is well."""


class CapturesOver(CaptureError):
    """A capture went wrong in a way that lets none follow; steps and graphs that are there go on."""


class DeviceLayer(Protocol):
    """Work runs on the current stream of `on`, in order; between streams only events order anything.

    upload, download: asynchronous copies between `pinned` memory and the device; the host side must stay as it is
    until an event recorded behind the copy is done.
    """

    device: torch.device

    def stream(self) -> Stream: ...

    def event(self) -> Event: ...

    def on(self, stream: Stream) -> AbstractContextManager[None]:
        """Make a stream the current one."""
        ...

    def launch(self, work: Callable[[], object]) -> None:
        """Issue torch operations on the current stream. May raise torch.OutOfMemoryError, with part of it issued.

        work must take nothing from the host but what stays unchanged until the step is done.
        """
        ...

    def upload(self, to: Tensor, source: Tensor) -> None: ...

    def download(self, to: Tensor, source: Tensor) -> None: ...

    def record(self, event: Event) -> None: ...

    def wait(self, event: Event) -> None:
        """Let the current stream wait for the event's latest record."""
        ...

    def is_done(self, event: Event) -> bool:
        """Never blocks. Raises what the device ran into."""
        ...

    def synchronize(self, event: Event) -> None:
        """Block the calling thread, which must not be the loop's. Raises what the device ran into."""
        ...

    def synchronize_all(self) -> None:
        """Block until the device is idle; inside `may_block` only."""
        ...

    def may_block(self) -> AbstractContextManager[None]:
        """The start and the end, where the loop thread may wait for the device."""
        ...

    def aside(self) -> AbstractContextManager[object]:
        """A thread beside the loop's, which may read what never changes and wait for that; on no stream of `on`."""
        ...

    def capture(self, work: Callable[[], object]) -> Graph:
        """Record `work` on the current stream without running it. Its tensors keep their addresses.

        Raises torch.OutOfMemoryError or CaptureError, and the device is as before.
        """
        ...

    def capture_parts(self, work: Callable[[Callable[[], None]], object]) -> list[Graph]:
        """The same in several graphs, to be replayed in this order: work calls what it is given where one ends."""
        ...

    def drop_graph_memory(self) -> None:
        """Let go of the memory that graphs share, once all of them are gone."""
        ...

    def replay(self, graph: Graph) -> None: ...

    def time(self, graph: Graph) -> float:
        """Seconds that a replay on the current stream takes, the best of a few; inside `may_block` only."""
        ...

    def pinned(self, num_bytes: int) -> Tensor:
        """Page-locked host memory, uint8 [num_bytes], zeroed."""
        ...

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor: ...

    def free_memory(self) -> int:
        """Bytes that an allocation could have now; inside `may_block` only."""
        ...

    def total_memory(self) -> int: ...

    def allocated_memory(self) -> int: ...

    def peak_memory(self, *, reset: bool = False) -> int:
        """Most bytes that tensors held since the last reset."""
        ...

    def is_lost(self, error: BaseException) -> bool:
        """Whether an error means that the device cannot be used any more."""
        ...

    def range(self, name: str) -> AbstractContextManager[None]:
        """A named range in the profiler's time line."""
        ...


class CudaDevice:
    """DeviceLayer by torch.cuda, on one GPU. nvtx: name the ranges for nsys (costs 1 us each)."""

    def __init__(self, index: int = 0, *, nvtx: bool = False) -> None:
        self.device = torch.device("cuda", index)
        self._nvtx = nvtx
        self._pool: Any = None
        self._first_graph: torch.cuda.CUDAGraph | None = None
        self._captures_over: str | None = None
        torch.cuda.set_device(self.device)

    def stream(self) -> Stream:
        return _cuda.Stream(self.device)

    def event(self) -> Event:
        # blocking: the waiter thread sleeps instead of spinning on a core that the loop needs.
        return _cuda.Event(blocking=True)

    def on(self, stream: Stream) -> AbstractContextManager[None]:
        context: AbstractContextManager[None] = _cuda.stream(stream)
        return context

    def launch(self, work: Callable[[], object]) -> None:
        work()

    def upload(self, to: Tensor, source: Tensor) -> None:
        to.copy_(source, non_blocking=True)

    def download(self, to: Tensor, source: Tensor) -> None:
        to.copy_(source, non_blocking=True)

    def record(self, event: Event) -> None:
        event.record()

    def wait(self, event: Event) -> None:
        torch.cuda.current_stream().wait_event(event)

    def is_done(self, event: Event) -> bool:
        return bool(event.query())

    def synchronize(self, event: Event) -> None:
        event.synchronize()  # without the GIL

    def synchronize_all(self) -> None:
        torch.cuda.synchronize(self.device)

    @contextlib.contextmanager
    def may_block(self) -> Iterator[None]:
        before = torch.cuda.get_sync_debug_mode()
        if not before:  # else even the first call warns that the mode is a prototype
            yield
            return
        torch.cuda.set_sync_debug_mode("default")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        # The device is a thread's own choice. Streams of torch's do not wait for the one that a thread begins with.
        with self.may_block(), _cuda.device(self.device):
            yield

    def capture(self, work: Callable[[], object]) -> torch.cuda.CUDAGraph:
        return self.capture_parts(lambda cut: work())[0]

    def capture_parts(self, work: Callable[[Callable[[], None]], object]) -> list[torch.cuda.CUDAGraph]:
        # Not `torch.cuda.graph`: that synchronises, collects garbage and empties the allocator's cache first.
        # thread_local: the waiter thread may go on waiting for events meanwhile.
        if self._captures_over is not None:
            raise CapturesOver(self._captures_over)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
            # torch refuses to capture into a pool whose last graph is gone, so the first stays.
            zeros = torch.zeros(1, device=self.device)
            self._first_graph = self._record(lambda cut: zeros.zero_())[0]
        return self._record(work)

    def _record(self, work: Callable[[Callable[[], None]], object]) -> list[torch.cuda.CUDAGraph]:
        graphs = [self._begin_capture()]

        def cut() -> None:
            self._end_capture(graphs[-1])
            graphs.append(self._begin_capture())

        try:
            work(cut)
        except CapturesOver:
            raise
        except BaseException as error:
            # Ending a broken capture fails in its own way; what broke it is what counts.
            try:
                graphs[-1].capture_end()
            except RuntimeError:
                self._end_of_captures(str(error))
            if isinstance(error, torch.OutOfMemoryError) or not isinstance(error, Exception):
                raise
            kind = CaptureError if self._captures_over is None else CapturesOver
            raise kind(f"{type(error).__name__}: {error}") from error
        self._end_capture(graphs[-1])
        return graphs

    def _begin_capture(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        return graph

    def _end_capture(self, graph: torch.cuda.CUDAGraph) -> None:
        try:
            graph.capture_end()
        except RuntimeError as error:
            self._end_of_captures(str(error))
            raise CapturesOver(str(error)) from error

    def _end_of_captures(self, reason: str) -> None:
        """A capture was invalidated. Until 2.12, torch then goes on as if it were still recording into the pool:
        its allocator never empties its cache again, nor tries anew when memory is short. So does its generator of the
        device's random numbers (2.11; 2.13 has a state of it for each capture), which then refuses to draw any.
        """
        self._captures_over = f"an earlier capture was invalidated: {(reason.splitlines() or [''])[0]}"
        end = getattr(torch._C, "_cuda_endAllocateToPool", None)
        if end is not None:
            with contextlib.suppress(RuntimeError):  # it is not recording, as it should be
                end(self.device.index, self._pool)
        # A copy of the generator's state is where the state was, and not in a capture. Graphs from before keep the old
        # one, which matters to none that draws nothing.
        with contextlib.suppress(RuntimeError, AttributeError, IndexError):
            generator = torch.cuda.default_generators[self.device.index]
            generator.graphsafe_set_state(generator.clone_state())

    def drop_graph_memory(self) -> None:
        self._first_graph = self._pool = None

    def replay(self, graph: torch.cuda.CUDAGraph) -> None:
        graph.replay()

    def time(self, graph: torch.cuda.CUDAGraph) -> float:
        seconds = []
        for _ in range(6):
            begin, end = _cuda.Event(enable_timing=True), _cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            seconds.append(begin.elapsed_time(end) / 1e3)
        return float(min(seconds))

    def pinned(self, num_bytes: int) -> Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True)

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def free_memory(self) -> int:
        try:
            torch.cuda.empty_cache()
            # Page-locked memory, of adapters that are gone above all, is the system's again: that waits for the device.
            torch._C._host_emptyCache()
        except RuntimeError as error:
            if self._captures_over is None:
                raise
            logger.warning("the allocator's cache cannot be emptied: %s", str(error).splitlines()[0])
        return torch.cuda.mem_get_info(self.device)[0]

    def total_memory(self) -> int:
        return torch.cuda.mem_get_info(self.device)[1]

    def allocated_memory(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    def peak_memory(self, *, reset: bool = False) -> int:
        peak = torch.cuda.max_memory_allocated(self.device)
        if reset:
            torch.cuda.reset_peak_memory_stats(self.device)
        return peak

    def is_lost(self, error: BaseException) -> bool:
        # AcceleratorError is what torch raises for a failed CUDA call; libraries only put it into words. Memory that is
        # not to be had, of whomever, costs no more than the step.
        text = str(error)
        if isinstance(error, torch.OutOfMemoryError) or any(word in text for word in OUT_OF_MEMORY):
            return False
        kinds = tuple(filter(None, [getattr(torch, "AcceleratorError", None)]))
        return isinstance(error, kinds) or any(word in text for word in DEVICE_ERRORS)

    @contextlib.contextmanager
    def range(self, name: str) -> Iterator[None]:
        if not self._nvtx:
            yield
            return
        _cuda.nvtx.range_push(name)
        try:
            yield
        finally:
            _cuda.nvtx.range_pop()

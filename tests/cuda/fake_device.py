"""A device in host memory that does everything as late and as out of step as CUDA allows, by a seed.

Streams are queues; their work runs at random moments, or not before somebody waits for it, and only stream order and
events order it. Copies read pinned memory when they run, in two halves. A captured graph replays the tensor
operations that its capture saw, at the addresses they had. What would block or corrupt a real device is asserted.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

from engine.ops import native

# Operations that copy a value to the host, which stops the calling thread until the device has caught up.
SYNCHRONISING = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::is_nonzero",
    "aten::equal",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::repeat_interleave.Tensor",
    "aten::repeat_interleave.self_Tensor",
    "aten::bincount",
}


class FakeDeviceError(RuntimeError):
    """What the device reports once work on it has failed; nothing runs any more."""


@contextlib.contextmanager
def _device_code() -> Iterator[None]:
    """torch operations alone, on one thread: a capture sees no native kernel, and small tensors gain by no team."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with native.disabled():
            yield
    finally:
        torch.set_num_threads(threads)


class FakeEvent:
    def __init__(self) -> None:
        self.recorded = 0
        self.completed = 0


@dataclass(slots=True)
class Work:
    """An entry of a stream. waits: it may run once that event's record of that number is done. records: likewise."""

    run: Callable[[], object]
    waits: tuple[FakeEvent, int] | None = None
    records: FakeEvent | None = None

    @property
    def is_ready(self) -> bool:
        return self.waits is None or self.waits[0].completed >= self.waits[1]


class FakeStream:
    """Work in order. thread: who issues it: the first who did, while that one lives."""

    def __init__(self) -> None:
        self.queue: deque[Work] = deque()
        self.thread: threading.Thread | None = None


class FakeGraph:
    """Operations on fixed tensors, in order."""

    def __init__(self) -> None:
        self.operations: list[Callable[[], object]] = []


@dataclass(frozen=True, slots=True)
class Operation:
    """What there is to know of one of torch's: a question to torch takes longer than many an operation.

    arguments: names of all; written: of those whose memory it changes, with their places.
    """

    func: Any
    name: str
    synchronises: bool
    masks_wait: bool  # an index that is a mask makes the host wait
    is_view: bool
    arguments: tuple[str, ...]
    written: tuple[tuple[int, str], ...]

    def named(self, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Its arguments by name."""
        return dict(zip(self.arguments, args, strict=False)) | kwargs

    def changed(self, args: Any, kwargs: dict[str, Any]) -> list[Any]:
        """What it writes to, None where that is not given."""
        return [args[place] if place < len(args) else kwargs.get(name) for place, name in self.written]


# By the identity of torch's own object, which Operation holds: to hash that takes a call.
OPERATIONS: dict[int, Operation] = {}


def operation_of(func: Any) -> Operation:
    operation = OPERATIONS.get(id(func))
    if operation is None:
        schema = func._schema
        operation = OPERATIONS[id(func)] = Operation(
            func,
            schema.name,
            schema.name in SYNCHRONISING or f"{schema.name}.{schema.overload_name}" in SYNCHRONISING,
            schema.name in ("aten::index", "aten::index_put_", "aten::index_put"),
            any(r.alias_info is not None for r in schema.returns),
            tuple(a.name for a in schema.arguments),
            tuple(
                (place, a.name)
                for place, a in enumerate(schema.arguments)
                if a.alias_info is not None and a.alias_info.is_write
            ),
        )
    return operation


def refuse_waits(operation: Operation, args: Any) -> None:
    """Of operations in a step's work: none makes the host wait."""
    assert not operation.synchronises, f"{operation.name} makes the host wait for the device"
    if operation.masks_wait:
        indices = [i for i in args[1] if i is not None]
        assert all(i.dtype != torch.bool for i in indices), f"{operation.name} by a mask makes the host wait"


class Mode(TorchDispatchMode):
    """Of what is never compiled: torch need not keep its compiler out of it, which takes a while at every operation."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class _NoSync(Mode):
    """Refuses operations that would synchronise."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        refuse_waits(operation_of(func), args)
        return func(*args, **(kwargs or {}))


def _is_harmless(tensor: Tensor) -> bool:
    """Whatever numbers are in it."""
    return tensor.is_floating_point() or not tensor.numel()


class _Recorder(Mode):
    """Notes operations instead of changing anything: outputs get memory, in-place operations are only noted."""

    def __init__(self, graph: FakeGraph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operation = operation_of(func)
        assert not operation.synchronises, f"{operation.name} cannot be captured: it synchronises"
        if operation.written:
            self.graph.operations.append(lambda: func(*args, **kwargs))
            results = operation.changed(args, kwargs)
            return results[0] if len(results) == 1 else tuple(results)
        given = tensors_of((args, kwargs))
        storages = {t.untyped_storage().data_ptr() for t in given}
        if operation.is_view or all(map(_is_harmless, given)):
            result = func(*args, **kwargs)
        else:
            # Only shapes count; zeros are a valid index everywhere, garbage is not.
            harmless = tree_map_only(Tensor, lambda t: t if _is_harmless(t) else torch.zeros_like(t), (args, kwargs))
            result = func(*harmless[0], **harmless[1])
        outputs = tensors_of(result)
        if all(t.untyped_storage().data_ptr() in storages for t in outputs if t.numel()):
            return result  # views stay views

        def replay() -> None:
            for old, new in zip(outputs, tensors_of(func(*args, **kwargs)), strict=True):
                assert old.shape == new.shape, f"{operation.name} changed its shape between capture and replay"
                old.copy_(new)

        self.graph.operations.append(replay)
        return result


@functools.cache
def bind_operations() -> None:
    """Bind all of torch's operations to Python, before several devices work in one process.

    Torch binds each as a mode first meets it, which is not for several threads at once.
    """
    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, operation = name.partition("::")
        packet, _, overload = operation.partition(".")
        with contextlib.suppress(AttributeError):  # some are not for Python
            getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")


def tensors_of(tree: Any) -> list[Tensor]:
    """Those in what an operation was given, or gave."""
    if isinstance(tree, Tensor):
        return [tree]
    found: list[Tensor] = []
    if isinstance(tree, NESTS):
        _gather(tree, found)
    return found


NESTS = list, tuple, dict


def _gather(tree: Any, found: list[Tensor]) -> None:
    for each in tree.values() if isinstance(tree, dict) else tree:
        if isinstance(each, Tensor):
            found.append(each)
        elif isinstance(each, NESTS) and each:
            _gather(each, found)


class FakeDevice:
    """A DeviceLayer. eagerness: how likely the device does a piece of work before anybody needs it.

    launches_until_failure: set by a test; the launch that counts it down to 0 runs out of memory.
    """

    def __init__(self, seed: int = 0, eagerness: float = 0.3) -> None:
        self.device = torch.device("cpu")
        self.random = Random(f"device {seed}")
        self.eagerness = eagerness
        self.loop_thread = threading.get_ident()
        self.streams: list[FakeStream] = []
        self._local = threading.local()
        self.error: BaseException | None = None
        self.recorder: _Recorder | None = None
        self.launches_until_failure = -1
        self.counts = {"upload": 0, "download": 0, "launch": 0, "replay": 0, "capture": 0}
        self.ranges: list[str] = []
        # What the memory questions are answered with.
        self.memory, self.allocated, self.peak = 2**24, 2**20, 2**20 + 2**19
        self._blocking_allowed = 0
        self._pinned: list[tuple[int, int]] = []
        self._lock = threading.RLock()

    @property
    def current(self) -> FakeStream | None:
        """The calling thread's stream."""
        return getattr(self._local, "stream", None)

    @current.setter
    def current(self, stream: FakeStream | None) -> None:
        self._local.stream = stream

    # ---- DeviceLayer

    def stream(self) -> FakeStream:
        self.streams.append(FakeStream())
        return self.streams[-1]

    def event(self) -> FakeEvent:
        return FakeEvent()

    @contextlib.contextmanager
    def on(self, stream: FakeStream) -> Iterator[None]:
        thread = threading.current_thread()
        if stream.thread is None or not stream.thread.is_alive():
            stream.thread = thread
        assert stream.thread is thread, "two threads issue work on one stream"
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def launch(self, work: Callable[[], object]) -> None:
        self._may_issue()
        assert not self._is_capturing, "launch inside a capture"
        self.counts["launch"] += 1
        self.launches_until_failure -= 1
        if self.launches_until_failure == 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore of it.")
        self._enqueue(lambda: self._compute(work))

    def upload(self, to: Tensor, source: Tensor) -> None:
        assert self.is_pinned(source), "an upload from pageable memory makes the host wait"
        assert not self.is_pinned(to)
        self.counts["upload"] += 1
        self._copy(to, source)

    def download(self, to: Tensor, source: Tensor) -> None:
        assert self.is_pinned(to), "a download to pageable memory makes the host wait"
        assert not self.is_pinned(source)
        self.counts["download"] += 1
        self._copy(to, source)

    def record(self, event: FakeEvent) -> None:
        self._may_issue()
        # Who waits for the event on another thread finds the record with the work that does it, or neither.
        with self._lock:
            event.recorded += 1
            number = event.recorded

            def work() -> None:
                event.completed = number

            self._enqueue(work, records=event)

    def wait(self, event: FakeEvent) -> None:
        self._may_issue()
        if event.recorded:
            self._enqueue(lambda: None, waits=(event, event.recorded))

    def is_done(self, event: FakeEvent) -> bool:
        self._pump()
        self._raise()
        return event.completed >= event.recorded

    def synchronize(self, event: FakeEvent) -> None:
        assert self._blocking_allowed or threading.get_ident() != self.loop_thread, "the loop thread waits for an event"
        with self._lock:
            number, lazy = event.recorded, self.random.random() < 0.5
            while event.completed < number:
                self._raise()
                self._step(event if lazy else None)
            self._raise()

    def synchronize_all(self) -> None:
        assert self._blocking_allowed, "the loop thread waits for the device"
        with self._lock:
            while any(stream.queue for stream in self.streams):
                self._raise()
                self._step(None)
            self._raise()

    @contextlib.contextmanager
    def may_block(self) -> Iterator[None]:
        self._blocking_allowed += 1
        try:
            yield
        finally:
            self._blocking_allowed -= 1

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        assert self.current is None, "what waits is on a stream of steps"
        yield

    def capture(self, work: Callable[[], object]) -> FakeGraph:
        return self.capture_parts(lambda cut: work())[0]

    def capture_parts(self, work: Callable[[Callable[[], None]], object]) -> list[FakeGraph]:
        self._on_loop()
        self.counts["capture"] += 1
        graphs = [FakeGraph()]
        self.recorder = recorder = _Recorder(graphs[0])

        def cut() -> None:
            graphs.append(FakeGraph())
            recorder.graph = graphs[-1]

        try:
            # Python that issues work runs on the loop's thread alone, at once, and what it sets is there for the rest
            # of it; here other threads run it late, which must not be amid a capture's.
            with self._lock, self._code(), recorder:
                work(cut)
        finally:
            self.recorder = None
        return graphs

    def drop_graph_memory(self) -> None:
        self.counts["drop"] = self.counts.get("drop", 0) + 1

    def replay(self, graph: FakeGraph) -> None:
        assert self.recorder is None
        self.counts["replay"] += 1

        def work() -> None:
            with torch.inference_mode():
                for operation in graph.operations:
                    operation()

        self._enqueue(work)

    def time(self, graph: FakeGraph) -> float:
        assert self._blocking_allowed, "the loop thread waits for the device"
        assert graph.operations
        return self.random.random()

    def pinned(self, num_bytes: int) -> Tensor:
        memory = torch.zeros(num_bytes, dtype=torch.uint8)
        self._pinned.append((memory.data_ptr(), memory.data_ptr() + num_bytes))
        self._keep = [*getattr(self, "_keep", []), memory]  # addresses must not be used again
        return memory

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The memory comes at once, the zeros in stream order."""
        if self.current is None:
            assert self._blocking_allowed, "work on the default stream"
            return torch.zeros(shape, dtype=dtype)
        memory = torch.ones(shape, dtype=dtype)
        self._enqueue(memory.zero_)
        return memory

    def free_memory(self) -> int:
        assert self._blocking_allowed
        return self.memory

    def total_memory(self) -> int:
        return 2 * self.memory

    def allocated_memory(self) -> int:
        return self.allocated

    def peak_memory(self, *, reset: bool = False) -> int:
        return self.peak

    def is_lost(self, error: BaseException) -> bool:
        return isinstance(error, FakeDeviceError)

    @contextlib.contextmanager
    def range(self, name: str) -> Iterator[None]:
        self.ranges.append(name)
        yield

    # ---- for what stands in for kernels, and for tests

    def kernel(self, work: Callable[[], object]) -> None:
        """Something opaque to torch, a kernel of a library: noted by a capture, done otherwise."""
        if self._is_capturing:
            # What another thread runs meanwhile is no part of it.
            assert self.recorder is not None
            self.recorder.graph.operations.append(work)
            return
        with _disable_current_modes():
            work()

    def is_pinned(self, tensor: Tensor) -> bool:
        return any(begin <= tensor.data_ptr() < end for begin, end in self._pinned)

    def fail(self, message: str) -> None:
        """Let the next work on the current stream break the device."""

        def work() -> None:
            raise RuntimeError(message)

        self._enqueue(work)

    # ---- the machine

    def _code(self) -> AbstractContextManager[None]:
        """Around whatever runs."""
        return _device_code()

    def _on_loop(self) -> None:
        assert threading.get_ident() == self.loop_thread, "only the loop thread captures"

    def _may_issue(self) -> None:
        """Of other threads only those that have a stream of their own."""
        assert threading.get_ident() == self.loop_thread or self.current is not None, "only the loop thread launches"

    @property
    def _is_capturing(self) -> bool:
        """A capture is its thread's."""
        return self.recorder is not None and threading.get_ident() == self.loop_thread

    def _compute(self, work: Callable[[], object]) -> None:
        with _NoSync():
            work()

    def _copy(self, to: Tensor, source: Tensor) -> None:
        assert to.shape == source.shape and to.dtype == source.dtype, "a copy must not convert"
        half = self.random.randint(0, len(to))
        for part in (slice(0, half), slice(half, None)):
            self._enqueue(lambda part=part: to[part].copy_(source[part]))  # type: ignore[misc]

    def _enqueue(
        self,
        run: Callable[[], object],
        waits: tuple[FakeEvent, int] | None = None,
        records: FakeEvent | None = None,
    ) -> None:
        self._may_issue()
        self._raise()
        assert self.current is not None, "work on the default stream"
        assert not self._is_capturing, "this cannot be captured"
        with self._lock:
            self.current.queue.append(Work(run, waits, records))
        self._pump()

    def _raise(self) -> None:
        if self.error is not None:
            raise FakeDeviceError(f"CUDA error: {self.error}") from self.error

    def _pump(self) -> None:
        with self._lock:
            while self.error is None and self.random.random() < self.eagerness:
                if not self._step(None, must=False):
                    return

    def _step(self, wanted: FakeEvent | None, must: bool = True) -> bool:
        """Do one piece of work of a random stream; with `wanted`, only of streams which that event depends on."""
        ready = [stream for stream in self.streams if stream.queue and stream.queue[0].is_ready]
        if wanted is not None:
            needed = self._needed(wanted)
            ready = [stream for stream in ready if stream in needed]
        if not ready:
            assert not must, "the streams wait for one another for ever"
            return False
        work = self.random.choice(ready).queue.popleft()
        try:
            with self._code():
                work.run()
        except BaseException as error:
            self.error = error
        return True

    def _needed(self, wanted: FakeEvent) -> list[FakeStream]:
        """Streams that hold a record of the event, or of one that such a stream waits for."""
        found: list[FakeStream] = []
        events = [wanted]
        for event in events:  # grows
            for stream in self.streams:
                if stream not in found and any(work.records is event for work in stream.queue):
                    found.append(stream)
                    events += [work.waits[0] for work in stream.queue if work.waits is not None]
        return found

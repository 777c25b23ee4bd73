"""CUDA executors of several ranks: rank 0's tells the others every step as it begins here, and they do the same.

What a rank launches holds sums in which all ranks meet, so all must launch the same: steps, graphs and memory that
comes and goes in one order, which is that of rank 0's messages; and every rank draws the same tokens from the same
logits, so that nothing comes back. A step that fails in one rank leaves the others waiting on their devices: then
the group ends, and with it the process.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from engine.config import StartupError
from engine.distributed import steps
from engine.distributed.device_group import RankedGroup
from engine.executor.base import StepHandle
from engine.executor.cuda import CUDAExecutor
from engine.executor.cuda_buffers import CudaHandle
from engine.executor.cuda_graph import GraphKey
from engine.executor.cuda_pages import DevicePages
from engine.forward import PARTS, ForwardInput, TokenMasks
from engine.ops.ranks import RanksEndedError


class RankedExecutor(CUDAExecutor):
    """What all ranks' have in common."""

    _group: RankedGroup

    def _judge(self, error: Exception) -> Exception:
        """See DeviceState."""
        what = " ".join(str(error).split())[:300]
        self._group.fail(f"rank {self._group.rank} failed amid a step: {type(error).__name__}: {what}")
        self._lose(error)
        assert self._lost is not None
        return self._lost


class LeadingExecutor(RankedExecutor):
    """Rank 0's: the one that the loop knows. on_close: ends the other ranks; may be called more than once."""

    def __init__(self, *given: Any, on_close: Callable[[], None] = lambda: None, **options: Any) -> None:
        super().__init__(*given, **options)
        self._on_close = on_close
        self._on_lost: Callable[[], None] | None = None
        # Steps whose masks the others do not have yet.
        self._awaited: dict[int, TokenMasks] = {}
        # Held while something beside steps is told and done.
        self._telling = threading.Lock()
        self.rank_pids: list[int] = []

    def submit(self, forward_input: ForwardInput) -> CudaHandle:
        """See Executor."""
        if self._lost is None:
            message, awaits = steps.write_step(forward_input, self._in_flight)
            if awaits:
                assert forward_input.masks is not None
                self._awaited[forward_input.step] = forward_input.masks
            self._tell(message)
        return super().submit(forward_input)

    def provide_masks(self, handle: StepHandle) -> None:
        """See Executor."""
        assert isinstance(handle, CudaHandle)
        masks = self._awaited.pop(handle.step, None)
        if masks is not None and self._lost is None:
            self._tell(steps.write_masks(masks))
        super().provide_masks(handle)

    def _tell(self, message: Sequence[steps.Bytes]) -> None:
        try:
            self._group.ring.send(message)
        except RanksEndedError:
            self._lose(RanksEndedError(self._group.why()))

    def _capture_when_idle(self) -> None:
        """See Captures."""
        if not self._telling.acquire(blocking=False):
            return
        try:
            super()._capture_when_idle()
        finally:
            self._telling.release()

    def _tell_capture(self, key: GraphKey) -> None:
        self._group.ring.send(steps.write_words(steps.CAPTURE, list(key)))

    @contextlib.contextmanager
    def _everywhere(self, do: str, **given: Any) -> Iterator[None]:
        """The body does the same here as the others do. Raises StartupError where it could not be done, in any."""
        if self._lost is not None:
            raise self._lost
        with self._telling:
            self._tell(steps.write_words(steps.COMMAND, {"do": do, **given}))
            try:
                with carried_out(self._group):
                    yield
            except StartupError:
                raise
            except BaseException:
                self._group.fail()
                raise

    def sleep(self, level: int, parts: Collection[str] = PARTS) -> None:
        """See Executor."""
        with self._everywhere("sleep", level=level, parts=list(parts)):
            super().sleep(level, parts)

    def wake_up(self, directory: Path | None = None, parts: Collection[str] = PARTS) -> None:
        """See Executor."""
        where = None if directory is None else str(directory)
        with self._everywhere("wake_up", directory=where, parts=list(parts)):
            super().wake_up(directory, parts)

    def load_weights(self, directory: Path) -> None:
        """See Executor."""
        with self._everywhere("load_weights", directory=str(directory)):
            super().load_weights(directory)

    def page_memory(self) -> DevicePages:
        """See Executor."""
        raise StartupError("the KV cache is divided over ranks (--tensor-parallel-size), each with its own heads")

    def state_memory(self) -> DevicePages | None:
        """See Executor."""
        return self.page_memory()

    def watch(self, on_lost: Callable[[], None]) -> None:
        """Call it, on any thread, when a rank is gone, also while nothing runs."""
        self._on_lost = on_lost
        if self._lost is not None:
            on_lost()

    def rank_is_gone(self, what: str) -> None:
        """Another rank's process has ended; any thread."""
        self._lose(RanksEndedError(what))
        if self._on_lost is not None:
            self._on_lost()

    def close(self) -> None:
        """See Executor."""
        super().close()
        self._on_close()


class FollowingExecutor(RankedExecutor):
    """Another rank's: does what it is told, and waits for a step only where what comes needs its staging."""

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self._running: deque[tuple[CudaHandle, TokenMasks | None]] = deque()
        self._begun: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._watch_device, name="device", daemon=True).start()

    def _end(self, handle: CudaHandle) -> None:
        """See CUDAExecutor."""
        super()._end(handle)
        self._begun.put(handle.side.done)

    def _watch_device(self) -> None:
        """A device that fails is told of at once, while the host waits for rank 0, which waits for this device."""
        while True:
            event = self._begun.get()
            try:
                self.layer.synchronize(event)
            except BaseException as error:
                what = " ".join(str(error).split())[:300]
                self._group.fail(f"the device of rank {self._group.rank} failed: {what}")
                return

    def follow(self) -> None:
        """Until the group is over: raises RanksEndedError then, and whatever a step fails by."""
        while True:
            message = self._group.ring.receive()
            kind = steps.kind_of(message)
            if kind == steps.STEP:
                self._run_step(message)
            elif kind == steps.MASKS:
                self._take_masks(message)
            else:
                while self._running:
                    self._finish_oldest()
                words = steps.read_words(message)
                if kind == steps.CAPTURE:
                    self._warm_up(GraphKey(*words), capture=True)
                else:
                    self._obey(**words)

    def _run_step(self, message: steps.Bytes) -> None:
        # What follows from their ends comes before this one here, too: they take what is no number out of pages.
        while len(self._running) > steps.num_ahead(message):
            self._finish_oldest()
        given = steps.read_step(message, self.staging[steps.step_number(message) & 1])
        handle = self.submit(given)
        self._check(handle)
        self._running.append((handle, given.masks))

    def _take_masks(self, message: steps.Bytes) -> None:
        [(handle, masks)] = [each for each in self._running if each[1] is not None and not each[1].is_ready]
        assert masks is not None
        steps.read_masks(message, masks)
        self.provide_masks(handle)
        for each, _ in self._running:
            self._check(each)

    def _finish_oldest(self) -> None:
        """The oldest step."""
        handle, _ = self._running.popleft()
        with self.layer.may_block():
            self.layer.synchronize(handle.side.done)
        self._settle(handle)

    @staticmethod
    def _check(handle: CudaHandle) -> None:
        if handle.error is not None:
            raise handle.error

    def _capture_later(self, seconds: float) -> None:
        """Rank 0 says when."""

    def _obey(self, do: str, **given: Any) -> None:
        """What rank 0 does as well, and with the same end in all."""
        if given.get("directory") is not None:
            given["directory"] = Path(given["directory"])
        with contextlib.suppress(StartupError), carried_out(self._group):
            getattr(self, do)(**given)


@contextlib.contextmanager
def carried_out(group: RankedGroup) -> Iterator[None]:
    """Where all have failed, that is an error of what was asked. Where some have, they are no longer alike."""
    failure: str | None = None
    try:
        yield
    except StartupError as error:
        failure = str(error)
    failures = group.exchange(failure)
    if all(each is None for each in failures):
        return
    first = next(each for each in failures if each is not None)
    if any(each is None for each in failures):
        group.fail()
        raise RanksEndedError(f"a rank could not do what the others did: {first}")
    raise StartupError(first)

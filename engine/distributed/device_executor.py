"""CUDA executors of several ranks: rank 0's tells the others every step as it begins here, and they do the same.

What a rank launches holds sums in which all ranks meet, so all must launch the same: steps, graphs and memory that
comes and goes in one order, which is that of rank 0's messages; and every rank draws the same tokens from the same
logits, so that nothing comes back. A step that fails in one rank leaves the others waiting on their devices: then
the group ends, and with it the process.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.config import StartupError
from engine.distributed import steps
from engine.distributed.adapters import FollowedAdapters, LeadingAdapters
from engine.distributed.device_group import RankedGroup
from engine.distributed.pages import (
    OF_PAGES,
    OF_STATES,
    Carrier,
    CarryingRank,
    Open,
    RankedPages,
    Rows,
    open_pages,
)
from engine.distributed.ring import ADAPTERS, PAGES
from engine.executor import cuda_drafter
from engine.executor.base import StepHandle
from engine.executor.cuda import CUDAExecutor
from engine.executor.cuda_adapters import PinnedWeights
from engine.executor.cuda_buffers import CudaHandle, Side
from engine.executor.cuda_graph import GraphKey
from engine.executor.cuda_pages import DevicePages
from engine.executor.reading import Reading
from engine.executor.speculator import Positions
from engine.forward import PARTS, ForwardInput, TokenMasks
from engine.ops.ranks import RanksEndedError
from engine.speculation.base import Proposer


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

    def _read_part(self, path: Path, reading: Reading) -> PinnedWeights:
        """Of an adapter, this rank's, while all read theirs."""
        found = self._read_adapter(path, reading.add_up)
        assert isinstance(found, PinnedWeights)
        return found


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
        self._shared = LeadingAdapters(self._group.ring.beside[ADAPTERS], self._group.beside)
        self._carrier = Carrier(self._group)
        self.rank_pids: list[int] = []

    def _launch(self, forward_input: ForwardInput, side: Side, handle: CudaHandle) -> None:
        """See CUDAExecutor. The others are told of it as it runs, drafts and all, when it does here."""
        loads = [(index, self._shared.of(weights)) for index, weights in forward_input.adapter_loads]
        told = steps.Told(side.number, self._in_flight - 1, loads, self._shared.take_gone())
        masks = forward_input.masks
        if masks is not None and handle.positions is not None:
            told.sampled = handle.positions.rows.tolist()
        if self._drafter is not None:
            told.speculating = [each.slot for each in forward_input.speculations]
            told.reading = None if handle.reading is None else handle.reading.words()
        message, awaits = steps.write_step(forward_input, told)
        if awaits:
            assert masks is not None
            self._awaited[forward_input.step] = masks
        self._tell(message)
        if self._lost is not None:
            handle.error = self._lost
            return
        super()._launch(forward_input, side, handle)

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

    def read_adapter(self, path: Path) -> PinnedWeights:
        """See Executor."""
        return self._shared.read(path, functools.partial(self._read_part, path))

    def drop_adapters(self, indices: Sequence[int]) -> None:
        """See Executor."""
        if self._lost is None:
            super().drop_adapters(indices)
            self._tell(steps.write_words(steps.DROP, {"indices": list(indices), "gone": self._shared.take_gone()}))

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
        # Nobody reads weights meanwhile: the others would wait for that one here, and it for them there.
        with self._shared.lock, self._telling:
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

    def page_memory(self) -> RankedPages:
        """See Executor."""
        found = open_pages(self._carrier, OF_PAGES, self._own_pages, self._pinned)
        assert found is not None
        return found

    def state_memory(self) -> RankedPages | None:
        """See Executor."""
        return open_pages(self._carrier, OF_STATES, self._own_states, self._pinned)

    def _pinned(self, num_bytes: int) -> Rows:
        rows: Rows = self.layer.pinned(num_bytes).numpy()
        return rows

    def _cleanse(self, handle: CudaHandle, rows: list[int]) -> None:
        """See CUDAExecutor. In the others now, too: their pages may be filled by a copy, which no step's message is
        before."""
        super()._cleanse(handle, rows)
        if self._lost is None:
            self._tell(steps.write_words(steps.CLEANSE, self._in_flight - (self._deferred is not None)))
            self._carrier.cleansed += 1

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
        self._shared = FollowedAdapters(self._group.ring.beside[ADAPTERS], self._group.beside, self._read_part)
        self._num_cleansed = 0
        self._has_cleansed = threading.Condition()
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
        threading.Thread(target=self._read_adapters, name="adapters", daemon=True).start()
        threading.Thread(target=self._carry_pages, name="pages", daemon=True).start()
        while True:
            message = self._group.ring.receive()
            kind = steps.kind_of(message)
            if kind == steps.STEP:
                self._run_step(message)
            elif kind == steps.MASKS:
                self._take_masks(message)
            elif kind == steps.CLEANSE:
                self._finish_but(steps.read_words(message))
                with self._has_cleansed:
                    self._num_cleansed += 1
                    self._has_cleansed.notify_all()
            else:
                self._finish_but(0)
                words = steps.read_words(message)
                if kind == steps.CAPTURE:
                    self._warm_up(GraphKey(*words), capture=True)
                elif kind == steps.DROP:
                    self._shared.forget(words["gone"])
                    self.drop_adapters(words["indices"])
                else:
                    self._obey(**words)

    def _run_step(self, message: steps.Bytes) -> None:
        # What follows from their ends comes before this one here, too: they take what is no number out of pages.
        self._finish_but(steps.num_ahead(message))
        side = self._sides[steps.side_of(message)]
        given, told = steps.read_step(message, side.staging)
        given.adapter_loads = [(index, self._shared.of(number)) for index, number in told.adapters]
        self._shared.forget(told.gone)
        handle = CudaHandle(given.step, given.num_rows, side, error=self._lost)
        if told.sampled is not None:
            rows = np.array(told.sampled, np.int64)
            handle.positions = Positions(rows, rows)
        if self._drafter is not None:
            self._drafter.begin(given, told.speculating)
            handle.reading = None if told.reading is None else cuda_drafter.Reading.of_words(told.reading)
        self._in_flight += 1
        self.num_steps += 1
        self._start(given, handle)
        self._check(handle)
        self._running.append((handle, given.masks))

    def _read_adapters(self) -> None:
        """What rank 0 reads, at the same time."""
        try:
            self._shared.follow()
        except RanksEndedError:
            pass
        except BaseException as error:
            self._group.fail(f"rank {self._group.rank} failed at an adapter: {type(error).__name__}: {error}")
            raise

    def _carry_pages(self) -> None:
        def wait(count: int) -> None:
            with self._has_cleansed:
                self._has_cleansed.wait_for(lambda: self._num_cleansed >= count)

        def aside(open_own: Open) -> DevicePages | None:
            with self.layer.aside():
                return open_own()

        kinds = {OF_PAGES: self._own_pages, OF_STATES: self._own_states}
        opening: dict[str, Open] = {kind: functools.partial(aside, own) for kind, own in kinds.items()}
        try:
            CarryingRank(self._group.ring.beside[PAGES], opening, wait).follow()
        except RanksEndedError:
            pass
        except BaseException as error:
            what = " ".join(str(error).split())[:300]
            self._group.fail(f"rank {self._group.rank} failed as pages were copied: {type(error).__name__}: {what}")

    def _take_masks(self, message: steps.Bytes) -> None:
        [(handle, masks)] = [each for each in self._running if each[1] is not None and not each[1].is_ready]
        assert masks is not None
        steps.read_masks(message, masks)
        self.provide_masks(handle)
        for each, _ in self._running:
            self._check(each)

    def _finish_but(self, count: int) -> None:
        """The oldest steps, so that so many are left."""
        while len(self._running) > count:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
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

    def _draft_by(self, proposer: Proposer | None) -> None:
        """Rank 0 does, and brings what it proposes in its steps, or what a model is to read in all ranks."""

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

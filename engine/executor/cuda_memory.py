"""Device memory that comes and goes while no step runs: sleep, wake up, other weights."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import torch

from engine.config import StartupError
from engine.executor.cuda_capture import Captures
from engine.executor.cuda_drafter import DeviceDrafter
from engine.executor.cuda_pages import DevicePages
from engine.forward import PARTS
from engine.models.offload import Offloaded, Weighed
from engine.models.parts.decoder import CausalLM


class MovingMemory(Captures):
    """See the module. load: reads the model from a directory, None for where `model` came from."""

    _load: Callable[[Path | None], CausalLM] | None
    _offloaded: Offloaded | None
    _pages_sleep = False
    # Held while weights move, and where the threads that read them beside the loop are counted.
    _beside: threading.Condition
    _num_reading = 0
    _weighed: Weighed
    # What was handed out of pages and states; those that are of no use any more with the rest.
    _carried: weakref.WeakSet[DevicePages]

    @property
    def page_bytes(self) -> int:
        """What a page takes in all layers of its groups, without drafts' own; 0 while it sleeps."""
        return sum(buffer.nbytes for buffer in self.attention.buffers) // (self.limits.num_pages + 1)

    def held_bytes(self) -> dict[str, int]:
        """Bytes of device memory by owner, pages left out. Loop thread."""
        held = {"weights": 0 if self._offloaded is not None else self._weighed(getattr(self, "model", None))}
        if self._states is not None:
            held["recurrent states"] = self._states.num_bytes
        others = self.layer.allocated_memory() - self.page_bytes * (self.limits.num_pages + 1) - sum(held.values())
        return held | {"activations, graphs and others": max(0, others)}

    def sleep(self, level: int, parts: Collection[str] = PARTS) -> None:
        """See `Executor.sleep`."""
        with self._released():
            if "weights" in parts and level == 2:
                self._reader()  # or it would never wake up
                if self._drafter is not None:
                    self._offloaded = self._without_target(self._drafter)
                del self.model
                if self._adapters is not None:
                    self._adapters.release_memory()
            elif "weights" in parts:
                drafting = None if self._drafter is None else self._drafter.net.weights
                self._offloaded = Offloaded([self.model, drafting])
            if "kv_cache" in parts:
                self._release_memory()
                self._pages_sleep = True

    def wake_up(self, directory: Path | None = None, parts: Collection[str] = PARTS) -> None:
        """See `Executor.wake_up`."""
        with self._released():
            try:
                if "weights" in parts:
                    if self._offloaded is not None:
                        self._offloaded.restore()
                    if not hasattr(self, "model"):
                        self.model = self._with_products(self._reader()(directory))
                if "kv_cache" in parts:
                    self._take_memory()
            except torch.OutOfMemoryError as error:
                if "kv_cache" in parts:
                    self._release_memory()
                raise StartupError(f"no device memory: {str(error).splitlines()[0]}") from error
            if "weights" in parts:
                self._offloaded = None
            if "kv_cache" in parts:
                self._pages_sleep = False

    def load_weights(self, directory: Path) -> None:
        """See `Executor.load_weights`. The KV cache makes room meanwhile, so that both models fit."""
        load = self._reader()
        with self._released():
            self._release_memory()
            self.layer.free_memory()
            problem: Exception | None = None
            try:
                self.model = self._with_products(load(directory))
            except Exception as error:
                problem = error.with_traceback(None)  # its frames hold what was half loaded
            gc.collect()
            self.layer.free_memory()
            if not self._pages_sleep:
                self._take_memory()
            if isinstance(problem, torch.OutOfMemoryError):
                raise StartupError(f"no device memory for two models: {str(problem).splitlines()[0]}")
            if problem is not None:
                raise problem

    def _without_target(self, drafter: DeviceDrafter) -> Offloaded:
        """What drafts goes to host memory: nobody reads its weights again."""
        drafter.use(None)
        try:
            return Offloaded(drafter.net.weights)
        except BaseException:
            drafter.use(self.model)
            raise

    def _release_memory(self) -> None:
        """Of pages and of recurrent states, whoever carries them elsewhere."""
        for carried in self._carried:
            carried.release()
        self._carried.clear()
        self.attention.release()
        if self._drafter is not None:
            self._drafter.release()
        if self._states is not None:
            self._states.release()

    def _take_memory(self) -> None:
        self.attention.allocate()
        if self._drafter is not None:
            self._drafter.allocate()
        if self._states is not None:
            self._states.allocate()

    def _reader(self) -> Callable[[Path | None], CausalLM]:
        if self._load is None:
            raise StartupError("this executor has nowhere to read weights from")
        return self._load

    @contextlib.contextmanager
    def _released(self) -> Iterator[None]:
        """The device idle and without graphs, which hold addresses; they are captured again as they are needed."""
        assert not self._in_flight, "memory moves under a step"
        with self._moving, self._beside, self.layer.may_block():
            self._beside.wait_for(lambda: not self._num_reading)
            self.layer.synchronize_all()
            self.pieces.clear()
            self.graphs.clear()
            if self._drafter is not None:
                self._drafter.graphs.clear()
            self._open = None
            try:
                yield
            finally:
                gc.collect()
                self.layer.synchronize_all()
                self.layer.free_memory()  # gives what nobody uses back to the driver

    @contextlib.contextmanager
    def _reading_weights(self) -> Iterator[None]:
        """On any thread but the loop's: no weight moves meanwhile. Waits for what moves them."""
        with self._beside:
            self._num_reading += 1
        try:
            yield
        finally:
            with self._beside:
                self._num_reading -= 1
                self._beside.notify_all()

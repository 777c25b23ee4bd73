"""Ranks as threads of one process, each with a fake device that works by itself, and what stands in for NCCL.

The collectives check what NCCL trusts: that every rank issues the same ones in the same order, all on one stream.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from engine.config import CacheOptions
from engine.distributed.device_executor import FollowingExecutor, LeadingExecutor
from engine.distributed.device_group import RankedGroup
from engine.distributed.ring import layouts_of, open_rings
from engine.executor.cuda_start import Ranked, build_cuda_encoder, build_cuda_executor, read_together
from engine.executor.drafting import Drafting
from engine.forward import Limits
from engine.models.loading.load import load_model
from engine.models.parts.decoder import CausalLM
from engine.models.registry import read_spec
from engine.ops import native
from engine.ops.ranks import Ranks, RanksEndedError
from tests.cuda.fake_device import FakeDevice, FakeEvent, FakeStream, bind_operations
from tests.cuda.support import TINY

# Where ranks do not meet, a test is to fail and not to hang.
PATIENCE_S = 300.0


class MeetingEndedError(RuntimeError):
    """What NCCL's kernels do when their communicator is aborted: they end."""


class Meeting:
    """Where the collectives of all ranks come together, the n-th of each."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._lock = threading.Condition()
        self._given: dict[int, dict[int, tuple[str, torch.dtype, Tensor]]] = {}
        self._taken: dict[int, int] = {}
        self._over = False
        # By rank, what it has issued.
        self.issued: list[list[tuple[str, tuple[int, ...], torch.dtype]]] = [[] for _ in range(size)]

    def meet(self, rank: int, kind: str, x: Tensor) -> list[Tensor]:
        """All ranks' x."""
        with self._lock:
            number = len(self.issued[rank])
            self.issued[rank].append((kind, tuple(x.shape), x.dtype))
            given = self._given.setdefault(number, {})
            given[rank] = (kind, x.dtype, x.clone())
            self._lock.notify_all()
            if not self._lock.wait_for(lambda: self._over or len(given) == self.size, PATIENCE_S) or self._over:
                raise MeetingEndedError(f"rank {rank} waits in vain in its collective {number}, {kind}")
            kinds = {(each[0], each[1], each[2].shape) for each in given.values()}
            assert len(kinds) == 1, f"the ranks meet in different collectives: {kinds}"
            self._taken[number] = self._taken.get(number, 0) + 1
            if self._taken[number] == self.size:
                del self._given[number]
            return [given[other][2] for other in range(self.size)]

    def abort(self) -> None:
        with self._lock:
            self._over = True
            self._lock.notify_all()


class FakeCollectives:
    """One rank's end, on its device: kernels that a capture notes and that wait for the other ranks when they run."""

    def __init__(self, meeting: Meeting, rank: int, device: WorkingDevice) -> None:
        self.rank, self.size = rank, meeting.size
        self._meeting, self._device = meeting, device
        self.streams: list[FakeStream] = []

    def _kernel(self, work: Callable[[], object]) -> None:
        def run() -> None:
            assert self._device.running is not None, "a collective outside of its stream's order"
            if self._device.running not in self.streams:
                self.streams.append(self._device.running)
            with torch.inference_mode():
                work()

        self._device.kernel(run)

    def gather(self, out: Tensor, x: Tensor) -> None:
        assert out.is_contiguous() and x.is_contiguous() and out.numel() == self.size * x.numel()
        flat = out.view(self.size, -1)
        self._kernel(lambda: flat.copy_(torch.stack(self._meeting.meet(self.rank, "gather", x.reshape(-1)))))

    def exchange(self, out: Tensor, x: Tensor) -> None:
        assert out.is_contiguous() and x.is_contiguous() and out.shape == x.shape and len(x) == self.size

        def work() -> None:
            every = self._meeting.meet(self.rank, "exchange", x)
            out.copy_(torch.stack([each[self.rank] for each in every]))

        self._kernel(work)

    def abort(self) -> None:
        self._meeting.abort()

    close = abort


class WorkingDevice(FakeDevice):
    """A FakeDevice that also works while nobody asks it to, as devices do: in a thread. running: whose work."""

    def __init__(self, seed: int = 0, eagerness: float = 0.3) -> None:
        super().__init__(seed, eagerness)
        self.running: FakeStream | None = None
        self._stopped = False
        self._worker = threading.Thread(target=self._work, daemon=True)
        self._worker.start()

    def _code(self) -> AbstractContextManager[None]:
        """What _device_code sets is the process's; where several devices work it is so all the time."""
        assert native._disabled
        return nullcontext()

    def _work(self) -> None:
        while not self._stopped:
            with self._lock:
                worked = self.error is None and self._step(None, must=False)
            if self.error is not None:
                return
            if not worked:
                time.sleep(0.0005)

    def stop(self) -> None:
        self._stopped = True
        self._worker.join(PATIENCE_S)

    def _enqueue(
        self,
        run: Callable[[], object],
        waits: tuple[FakeEvent, int] | None = None,
        records: FakeEvent | None = None,
    ) -> None:
        stream = self.current

        def noted() -> None:
            self.running = stream
            try:
                run()
            finally:
                self.running = None

        super()._enqueue(noted, waits, records)


class Machine:
    """A group of ranks: rank 0's executor, for the thread that made it, and the others on theirs."""

    def __init__(
        self,
        size: int,
        *,
        config: dict[str, Any] | None = None,
        cuda_graph: str = "lazy",
        seed: int = 0,
        num_pages: int = 40,
        module: Callable[[FakeDevice], Any] | None = None,
        expert_parallel: bool = False,
        encoder: Limits | None = None,
        load: Callable[[RankedGroup, Path | None], CausalLM] | None = None,
        memories: list[int] | None = None,
        drafting: Callable[[CausalLM, int], Drafting] | None = None,
        **options: Any,
    ) -> None:
        self.size, self.seed, self.cuda_graph, self.num_pages = size, seed, cuda_graph, num_pages
        self.module, self.options, self.memories = module, options, memories
        self.expert_parallel, self.encoder = expert_parallel, encoder
        # By its model and its number, what a rank's drafts are made of.
        self.drafting = drafting
        self.load = load or functools.partial(load_part, json.dumps(config or TINY))
        self.meeting = Meeting(size)
        bind_operations()
        files = [Ranks.make_file(layout) for layout in layouts_of(size)]
        with mock.patch.object(native, "_disabled", 0):  # the rings are no part of the device
            self.rings = [open_rings(files, rank, size) for rank in range(size)]
        for file in files:
            os.close(file)
        self.devices: list[WorkingDevice] = [None] * size  # type: ignore[list-item]
        self.collectives: list[FakeCollectives] = [None] * size  # type: ignore[list-item]
        self.executors: list[Any] = [None] * size
        self.rows: list[list[tuple[str, str]]] = [[] for _ in range(size)]
        self.errors: list[BaseException] = []
        self._built = [threading.Event() for _ in range(size)]
        self.threads = [threading.Thread(target=self._follow, args=(rank,), daemon=True) for rank in range(1, size)]
        for thread in self.threads:
            thread.start()
        try:
            self.leader: LeadingExecutor = self._build(0, functools.partial(LeadingExecutor, on_close=self.stop))
        except BaseException:
            self.stop()
            raise
        for rank in range(1, size):
            assert self._built[rank].wait(PATIENCE_S), self.errors

    def _build(self, rank: int, make: Callable[..., Any]) -> Any:
        device = WorkingDevice(100 * self.seed + rank, (0.0, 0.3, 0.9)[(self.seed + rank) % 3])
        if self.memories is not None:
            device.memory = self.memories[rank]
        self.devices[rank] = device
        self.collectives[rank] = FakeCollectives(self.meeting, rank, device)
        group = RankedGroup(self.rings[rank], self.collectives[rank], expert_parallel=self.expert_parallel)

        def load(directory: Path | None) -> CausalLM:
            return read_together(functools.partial(self.load, group), directory, group)

        common: dict[str, Any] = {
            "dtype": torch.float32,
            "load": load,
            "ranked": Ranked(group, make),
            "row": lambda name, text: self.rows[rank].append((name, text)),
        }
        if self.encoder is not None:
            executor = build_cuda_encoder(load(None), device, self.encoder, **common)
            self.executors[rank] = executor
            self._built[rank].set()
            return executor
        given: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 24, "max_model_len": 64}
        num_pages = None if self.memories is not None else self.num_pages
        model = load(None)
        if self.drafting is not None:
            given["drafting"] = self.drafting(model, rank)
        executor = build_cuda_executor(
            model,
            device,
            CacheOptions(page_size=4, num_pages=num_pages),
            cuda_graph=self.cuda_graph,
            module=None if self.module is None else self.module(device),
            **(common | given | self.options),
        )
        self.executors[rank] = executor
        self._built[rank].set()
        return executor

    def _follow(self, rank: int) -> None:
        try:
            self._build(rank, FollowingExecutor).follow()
        except RanksEndedError:
            pass
        except BaseException as error:
            self.errors.append(error)
            self.rings[rank].end()
        finally:
            # As the parent of a rank that ends does with its own collectives.
            self.meeting.abort()

    def stop(self) -> None:
        """End it, as the members' end does."""
        self.rings[0].end()
        self.meeting.abort()
        for thread in self.threads:
            thread.join(PATIENCE_S)
        for device in self.devices:
            if device is not None:
                device.stop()

    def check(self) -> None:
        """Behind a run in which nothing was to fail."""
        assert not self.errors, self.errors
        first = self.meeting.issued[0]
        assert all(issued == first for issued in self.meeting.issued) and first
        for executor, collectives in zip(self.executors, self.collectives, strict=True):
            assert collectives.streams[-1] is executor._compute, "collectives of steps are on the compute stream"


def load_part(config: str, group: RankedGroup, directory: Path | None = None, **options: Any) -> CausalLM:
    """A rank's part of tiny_model, or of the checkpoint in a directory."""
    with tempfile.TemporaryDirectory() as folder:
        where, options = (
            (Path(folder), {"load_format": "dummy", **options}) if directory is None else (directory, options)
        )
        if directory is None:
            (where / "config.json").write_text(config)
        given: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu"), "seed": 3, "max_model_len": 256}
        return load_model(read_spec(where), where, group=group, **(given | options))


@contextmanager
def machine(size: int, **options: Any) -> Iterator[Machine]:
    """See Machine."""
    made = Machine(size, **options)
    try:
        yield made
        made.check()
    except BaseException as error:
        for rank, device in enumerate(made.devices):
            error.add_note(f"the device of rank {rank}: {device.error!r}")
        error.add_note(f"the group: {made.leader._group.why()}")
        raise
    finally:
        made.leader.close()

"""How a group of ranks on GPUs comes to be: one process for each, of which this one is the first.

All run the start of one GPU (executor/cuda_start.py), each on its own, and meet where it decides. Called once by the
composition root, before the loop runs; it blocks.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import logging
import os
import shutil
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch

from engine.config import EngineConfig, StartupError
from engine.distributed.collectives import TorchCollectives
from engine.distributed.device_executor import LeadingExecutor
from engine.distributed.device_group import RankedGroup
from engine.distributed.members import Members
from engine.distributed.ring import Ring, layouts_of, open_rings
from engine.executor import cuda_start
from engine.executor.start import Start
from engine.models.hub import resolve
from engine.models.loading.slices import FLAG, refuse
from engine.ops import native
from engine.ops.ranks import Ranks
from engine.speculation.registry import PROPOSERS

logger = logging.getLogger("oneloop.ranks")

MAX_RANKS = 64
# Seconds that a start, which may wait on the device for a rank that is gone, has to find that out.
STUCK_S = 5.0


def start(given: Start, stand_in: str | None = None) -> LeadingExecutor:
    """Start the ranks, load the model in all of them, divide their memory, and say what was decided.

    stand_in: what tests have instead of GPUs and NCCL, "module:function" (see device_rank.py). Raises StartupError.
    """
    if (why := _obstacle(given, stand_in)) is not None:
        raise StartupError(why)
    config, size = given.config, given.config.tensor_parallel_size
    files = [Ranks.make_file(layout) for layout in layouts_of(size)]
    folder = Path(tempfile.mkdtemp(prefix="oneloop-ranks-"))
    try:
        job = _job(config, given) | {"meeting": str(folder / "meeting"), "stand_in": stand_in}
        job |= {"size": size, "files": files}
        return _Leader(given, open_rings(files, 0, size), job).start()
    finally:
        for file in files:
            os.close(file)  # mapped by now, and inherited
        shutil.rmtree(folder, ignore_errors=True)


def _job(config: EngineConfig, given: Start) -> dict[str, Any]:
    """What every rank is told, but for its number."""
    options: dict[str, Any] = {"model": config.model, "cache": config.cache, "scheduler": config.scheduler}
    options |= {"logprobs": config.logprobs, "cuda": config.cuda}
    # Rank 0 names adapters, and says which are loaded; it drafts, and the others know how many rows that makes. What
    # drafts by weights is read by all, from where this one has found it.
    speculation = config.speculation
    if speculation.model is not None and speculation.method not in PROPOSERS:
        found = resolve(speculation.model, speculation.revision, config.model.download_dir)
        speculation = dataclasses.replace(speculation, model=str(found.absolute()), revision=None)
    options["speculation"] = speculation
    options["lora"] = dataclasses.replace(config.lora, modules=())
    model = dataclasses.replace(config.model, seed=config.model.seed or 0)
    return {
        **{name: dataclasses.asdict(each) for name, each in options.items()},
        "model": dataclasses.asdict(model),
        "device": "cuda",
        "directory": str(Path(given.directory).absolute()),
        "context": given.context,
        "headless": given.spec.headless,
        "expert_parallel": config.expert_parallel,
    }


def _obstacle(given: Start, stand_in: str | None) -> str | None:
    """Why it cannot be."""
    config, size = given.config, given.config.tensor_parallel_size
    if size > MAX_RANKS:
        return f"{FLAG} {size} is more than {MAX_RANKS}"
    if stand_in is None:
        if not sys.platform.startswith("linux"):
            return f"{FLAG} {size} works on Linux alone"
        count = torch.cuda.device_count()
        if count < size:
            return f"{FLAG} {size}: this machine has {count} GPU{'' if count == 1 else 's'}"
        if not (torch.distributed.is_available() and torch.distributed.is_nccl_available()):
            return f"{FLAG} {size} needs NCCL, which this torch was built without"
    if native.library() is None:
        return (
            f"{FLAG} {size} needs the compiled kernels, for the ranks' shared memory, and here it is {native.status()}"
        )
    if config.expert_parallel and not given.spec.experts:
        return f"--enable-expert-parallel: {given.spec.architecture or 'this model'} has no experts"
    return refuse(given.spec, size, expert_parallel=config.expert_parallel)


class _Leader:
    """Of one start. Its members tell of one that is gone on a thread of theirs."""

    def __init__(self, given: Start, ring: Ring, job: dict[str, Any]) -> None:
        self._given, self._ring, self._job = given, ring, job
        self._collectives: Any = None
        self._executor: LeadingExecutor | None = None
        self._done = threading.Event()
        self._closed = False
        jobs = [{**job, "rank": rank} for rank in range(1, ring.size)]
        self._members = Members(jobs, tuple(job["files"]), self._gone)

    def start(self) -> LeadingExecutor:
        try:
            executor = self._start()
        except BaseException as error:
            why = self._ring.last_word() or self._members.gone
            self.close()
            if isinstance(error, Exception) and why is not None:
                raise StartupError(why) from error
            raise
        finally:
            self._done.set()
        self._executor = executor
        if self._members.gone is not None:
            executor.rank_is_gone(self._members.gone)
        return executor

    def _start(self) -> LeadingExecutor:
        given, job, ring = self._given, self._job, self._ring
        size, report = ring.size, given.report
        layer = None
        with report.phase("ranks"):
            ring.exchange(None)  # all are there
            if job["stand_in"] is None:
                torch.cuda.set_device(0)
                self._collectives = TorchCollectives(job["meeting"], 0, size, torch.device("cuda", 0))
            else:
                module, _, name = job["stand_in"].partition(":")
                layer, self._collectives = getattr(importlib.import_module(module), name)(job["meeting"], 0, size)
        whole = given.config.expert_parallel
        group = RankedGroup(ring, self._collectives, lambda: self._members.gone, expert_parallel=whole)
        make = functools.partial(LeadingExecutor, on_close=self.close)
        executor = cuda_start.start(given, cuda_start.Ranked(group, make), layer)
        assert isinstance(executor, LeadingExecutor)
        executor.rank_pids = self._members.pids
        for rank, memory in enumerate(group.exchange(None)[1:], 1):
            report.row(f"rank {rank}", memory)
        report.row("sums of ranks", "gathered by NCCL and added up in their order: the same bits in every batch")
        return executor

    def _gone(self, what: str) -> None:
        if (word := self._ring.last_word()) is not None:
            what = f"{what}: {word}"
        logger.error("%s", what)
        self._ring.end()
        if self._executor is not None:
            self._executor.rank_is_gone(what)
        elif not self._done.is_set():
            threading.Thread(target=self._end_if_stuck, name="start", daemon=True).start()
        if self._collectives is not None:
            self._collectives.abort()

    def _end_if_stuck(self) -> None:
        if not self._done.wait(STUCK_S):
            print(f"error: {self._ring.last_word() or self._members.gone}", file=sys.stderr, flush=True)
            os._exit(1)

    def close(self) -> None:
        """End the other ranks. Idempotent."""
        if not self._closed:
            self._closed = True
            self._ring.end()
            self._members.close()
            if self._collectives is not None:
                self._collectives.close()

"""A rank on a GPU beside the one that has the event loop: starts as that does, and does what it is told.

Called by rank.py, in a process of its own, with a job by device_start.py.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from engine.config import (
    CacheOptions,
    CudaOptions,
    EngineConfig,
    LogprobOptions,
    LoraOptions,
    ModelOptions,
    SchedulerOptions,
    SpeculationOptions,
    StartupError,
)
from engine.ops.ranks import RanksEndedError

logger = logging.getLogger("oneloop.ranks")


def config_of(job: dict[str, Any]) -> EngineConfig:
    """What a rank's start looks at."""
    return EngineConfig(
        model=ModelOptions(**job["model"]),
        cache=CacheOptions(**job["cache"]),
        scheduler=SchedulerOptions(**job["scheduler"]),
        logprobs=LogprobOptions(**job["logprobs"]),
        cuda=CudaOptions(**job["cuda"]),
        lora=LoraOptions(**job["lora"]),
        speculation=SpeculationOptions(**job["speculation"]),
        device="cuda",
        tensor_parallel_size=job["size"],
        expert_parallel=job["expert_parallel"],
    )


def serve(job: dict[str, Any]) -> int:
    """Until the group ends; the process's exit status. What goes wrong is told to rank 0, which says it."""
    from engine.distributed.ring import open_rings

    ring = open_rings(job["files"], job["rank"], job["size"])
    try:
        _serve(job, ring)
    except RanksEndedError:
        return 0
    except StartupError as error:
        ring.end(str(error))
    except BaseException as error:
        ring.end(f"rank {job['rank']} failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        logger.exception("rank %d failed", job["rank"])
    return 1


def _serve(job: dict[str, Any], ring: Any) -> None:
    import torch

    from engine.distributed.collectives import TorchCollectives
    from engine.distributed.device_executor import FollowingExecutor
    from engine.distributed.device_group import RankedGroup
    from engine.executor import cuda_start
    from engine.executor.start import Start
    from engine.models.registry import read_spec
    from engine.report import StartupReport

    layer, collectives = None, None
    rank, size, config = job["rank"], job["size"], config_of(job)
    ring.exchange(None)  # all are there
    if job["stand_in"] is None:
        torch.cuda.set_device(rank)
        collectives = TorchCollectives(job["meeting"], rank, size, torch.device("cuda", rank))
    else:
        layer, collectives = _stand_in(job["stand_in"], job["meeting"], rank, size)
    group = RankedGroup(ring, collectives, expert_parallel=config.expert_parallel)
    directory = Path(job["directory"])
    spec = dataclasses.replace(read_spec(directory), headless=job["headless"], projections=())
    report = StartupReport()
    given = Start(config, directory, spec, job["context"], report)
    ranked = cuda_start.Ranked(group, FollowingExecutor)
    executor = cuda_start.start(given, ranked, layer)
    assert isinstance(executor, FollowingExecutor)
    group.exchange(dict(report.rows).get("GPU memory"))
    executor.follow()


def _stand_in(where: str, *given: Any) -> tuple[Any, Any]:
    """Tests have a device and collectives of their own: "module:function"."""
    import importlib

    module, _, name = where.partition(":")
    found: tuple[Any, Any] = getattr(importlib.import_module(module), name)(*given)
    return found

"""Ranks in processes of their own, through the start that GPUs have: real messages, real torch.distributed over gloo."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from engine.config import (
    CacheOptions,
    EngineConfig,
    LoraOptions,
    ModelOptions,
    SchedulerOptions,
    SpeculationOptions,
    StartupError,
)
from engine.distributed import device_start
from engine.distributed.device_executor import LeadingExecutor
from engine.executor.start import Start
from engine.forward import DeviceLostError
from engine.models.registry import read_spec
from engine.ops import native
from engine.report import StartupReport
from engine.request import Request, SamplingParams
from tests.cuda.support import expected_tokens, requests_of, serve, tiny_directory, tiny_model
from tests.distributed.test_processes import wait_until_gone

STAND_IN = "tests.cuda.rank_process:stand_in"


def given_of(size: int, **options: Any) -> Start:
    config = EngineConfig(
        model=ModelOptions(dtype="float32", load_format="dummy", seed=3),
        cache=CacheOptions(page_size=4, num_pages=40),
        scheduler=SchedulerOptions(max_num_seqs=4, max_num_batched_tokens=24),
        tensor_parallel_size=size,
        **options,
    )
    directory = tiny_directory()
    return Start(config, directory, read_spec(directory), 64, StartupReport())


@contextmanager
def started(given: Start) -> Iterator[LeadingExecutor]:
    with mock.patch.object(native, "_disabled", 0):  # the ring is no part of the device
        executor = device_start.start(given, STAND_IN)
    try:
        yield executor
    finally:
        executor.close()


@pytest.mark.parametrize("size", [2, 4])
async def test_the_tokens_of_one_process(size: int) -> None:
    given = given_of(size)
    requests = requests_of(3)
    with started(given) as executor:
        pids = executor.rank_pids
        assert len(pids) == size - 1
        assert await serve(executor, requests) == [expected_tokens(tiny_model(), request) for request in requests]
    wait_until_gone(pids)
    rows = dict(given.report.rows)
    assert all("KV cache" in rows[f"rank {rank}"] for rank in range(1, size))

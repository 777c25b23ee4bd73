"""Ranks in processes of their own, by the start that GPUs have: real messages, real torch.distributed over gloo."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
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
from engine.engine import Engine
from engine.executor.start import Start
from engine.forward import DeviceLostError
from engine.models.registry import read_spec
from engine.ops import native
from engine.report import StartupReport
from engine.request import FinishReason, Request, SamplingParams
from tests.cuda.support import (
    ALWAYS,
    NO_DRAFTS,
    expected_tokens,
    make_executor,
    requests_of,
    serve,
    tiny_directory,
    tiny_model,
)
from tests.cuda.test_adapters import adapters_of, merged
from tests.cuda.test_draft_heads import WITHOUT, apart, read_target
from tests.cuda.test_draft_models import longer
from tests.cuda.test_drafts import repeating
from tests.distributed.test_processes import wait_until_gone
from tests.speculation import test_mtp as mtp

STAND_IN = "tests.cuda.rank_process:stand_in"


def given_of(size: int, **options: Any) -> Start:
    given: dict[str, Any] = {
        "model": ModelOptions(dtype="float32", load_format="dummy", seed=3),
        "cache": CacheOptions(page_size=4, num_pages=40),
        "scheduler": SchedulerOptions(max_num_seqs=4, max_num_batched_tokens=24),
        "tensor_parallel_size": size,
    }
    config = EngineConfig(**(given | options))
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


def copied(executor: LeadingExecutor, size: int) -> None:
    """Pages of all ranks, there and back; they are empty again afterwards."""
    memory = executor.page_memory()
    assert memory.layout.startswith(f"{size} ranks: ")
    out, data = np.zeros((2, 2, memory.page_bytes), np.uint8)
    data[:] = np.random.default_rng(size).integers(0, 100, data.shape)
    memory.copy_in(np.array([9, 4], np.int32), data)
    memory.copy_out(np.array([4, 9], np.int32), out)
    assert np.array_equal(out, data[::-1])
    memory.copy_in(np.array([9, 4], np.int32), np.zeros_like(data))


async def test_a_draft_model_of_its_own_in_every_process(tmp_path: Path) -> None:
    """Named by where it is from here."""
    (tmp_path / "config.json").write_text((tiny_directory() / "config.json").read_text())
    speculation = dataclasses.replace(ALWAYS, method="draft_model", model=str(tmp_path))
    requests = repeating(3)
    with started(given_of(2, speculation=speculation)) as executor:
        tokens = await serve(executor, requests, speculation=speculation)
        assert tokens == [expected_tokens(tiny_model(), request) for request in requests]
        assert executor._drafter is not None and executor._drafter.graphs.num_replays


async def test_the_layer_of_a_checkpoint_drafts_in_every_process(tmp_path: Path) -> None:
    """Whole, beside a part of the model whose embedding and output layer it reads."""
    mtp.write(tmp_path, "mimo")
    requests = apart(longer(requests_of(1)))
    alone = await serve(make_executor(WITHOUT, model=read_target(tmp_path)), requests)
    speculation = dataclasses.replace(ALWAYS, method="mtp")
    given = given_of(2, speculation=speculation, model=ModelOptions(dtype="float32", load_format="auto"))
    given = dataclasses.replace(given, directory=tmp_path, spec=read_spec(tmp_path))
    with started(given) as executor:
        assert await serve(executor, requests, speculation=speculation) == alone
        assert executor._drafter is not None and executor._drafter.graphs.num_replays
    assert dict(given.report.rows)["draft model"].startswith("mtp, ")


@pytest.mark.parametrize("size", [2, 4])
async def test_the_tokens_of_one_process(size: int, tmp_path: Path) -> None:
    """Of two also with adapters, of four with drafts."""
    speculation = NO_DRAFTS if size == 2 else ALWAYS
    lora = LoraOptions(enable=size == 2, max_loras=2, max_lora_rank=8)
    given = given_of(size, lora=lora, speculation=speculation)
    requests, models = requests_of(3) if size == 2 else repeating(3), [tiny_model()] * 8
    with started(given) as executor:
        pids = executor.rank_pids
        assert len(pids) == size - 1
        await asyncio.to_thread(copied, executor, size)
        if size == 2:
            adapters = [None, *adapters_of("llama", executor, tmp_path)]
            requests = [dataclasses.replace(each, adapter=adapters[n % 4]) for n, each in enumerate(requests)]
            models = [merged("llama", number) for number in range(4)] * 2
        expected = [expected_tokens(model, request) for model, request in zip(models, requests, strict=False)]
        assert await serve(executor, requests, speculation=speculation) == expected
    wait_until_gone(pids)
    rows = dict(given.report.rows)
    assert all("KV cache" in rows[f"rank {rank}"] for rank in range(1, size))


async def test_a_rank_that_is_killed_ends_the_engine_and_tells_its_streams() -> None:
    with started(given_of(2)) as executor:
        engine = Engine(EngineConfig(), executor, None)
        loop_task = asyncio.create_task(engine.run())
        params = SamplingParams(max_tokens=50, ignore_eos=True)
        [rank] = executor.rank_pids
        finish = None
        async with engine.submit(Request("one", [5, 6, 7], params)) as stream:
            async for delta in stream:
                if finish is None and delta.token_ids:
                    os.kill(rank, signal.SIGKILL)
                finish = delta.finish_reason or finish
        assert finish is FinishReason.ERROR
        with pytest.raises(DeviceLostError):
            await loop_task


async def test_a_rank_that_is_killed_while_nothing_runs() -> None:
    with started(given_of(2)) as executor:
        engine = Engine(EngineConfig(), executor, None)
        loop_task = asyncio.create_task(engine.run())
        await asyncio.sleep(0)
        os.kill(executor.rank_pids[0], signal.SIGKILL)
        with pytest.raises(DeviceLostError):
            await asyncio.wait_for(loop_task, 300)


def test_what_the_ranks_cannot_read_is_one_line_of_the_start(tmp_path: Path) -> None:
    given = given_of(2, model=ModelOptions(dtype="float32", load_format="auto", seed=3))
    (tmp_path / "config.json").write_text((given.directory / "config.json").read_text())
    given = dataclasses.replace(given, directory=tmp_path)
    with pytest.raises(StartupError, match=str(tmp_path)), started(given):
        pass


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"size": 3}, "--tensor-parallel-size 3: does not divide the 4 attention heads"),
        ({"size": 65}, "--tensor-parallel-size 65 is more than 64"),
        ({"speculation": SpeculationOptions("draft_model", "/no/such/model")}, "/no/such/model: no such directory"),
        ({"speculation": SpeculationOptions("draft_model")}, "speculative method 'draft_model' needs a model"),
        ({"expert_parallel": True}, "--enable-expert-parallel: LlamaForCausalLM has no experts"),
    ],
)
def test_what_cannot_be_is_one_line(options: dict[str, Any], line: str) -> None:
    size = options.pop("size", 2)
    with pytest.raises(StartupError, match=line), started(given_of(size, **options)):
        pass


def test_ranks_need_gpus_and_nccl() -> None:
    with pytest.raises(StartupError, match=r"--tensor-parallel-size 2: this machine has 0 GPUs$"):
        device_start.start(given_of(2))
    with mock.patch.object(torch.cuda, "device_count", lambda: 2):
        nccl = mock.patch.object(torch.distributed, "is_nccl_available", lambda: False)
        with nccl, pytest.raises(StartupError, match="needs NCCL, which this torch was built without"):
            device_start.start(given_of(2))

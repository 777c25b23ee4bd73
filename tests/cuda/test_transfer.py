"""Prefill and decode apart on devices with memory of their own: what comes over is what was computed there, whenever
either device gets round to copying it."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from engine.config import EngineConfig, SpeculationOptions, StartupError, TransferOptions
from engine.engine import Engine
from engine.executor.cuda import CUDAExecutor
from engine.transfer.nixl import NixlConnector
from engine.transfer.registry import make_connector
from tests.cuda.fake_device import FakeDevice
from tests.cuda.support import NO_DRAFTS, expected_tokens
from tests.cuda.test_draft_models import MODEL, itself, make, with_net
from tests.cuda.test_host_tier import LIMITS, ask, executor_of, prompts
from tests.transfer.test_models import exchange_of, prefilled, request_of, settled

TRANSFER = TransferOptions(connector="TcpConnector", role="kv_both", receive_timeout_s=60.0, kept_share=1.0)


@asynccontextmanager
async def running(executor: CUDAExecutor, speculation: SpeculationOptions = NO_DRAFTS) -> AsyncIterator[Engine]:
    config = EngineConfig(transfer=TRANSFER, check_invariants=True, speculation=speculation)
    engine = Engine(config, executor, None)
    engine.enable_transfer(make_connector(TRANSFER), lambda other: "weights")
    task = asyncio.create_task(engine.run())
    try:
        yield engine
        await settled(engine)
        assert not engine.lending.lent
    finally:
        task.cancel()
        await asyncio.wait({task})
        executor.close()


@pytest.mark.parametrize("kind", ["full", "states", "windows"])
@pytest.mark.parametrize(("seed", "eagerness"), [(0, 0.0), (1, 0.9)])
async def test_what_was_read_is_what_was_computed(kind: str, seed: int, eagerness: float) -> None:
    prefiller, decoder = (executor_of(kind, FakeDevice(seed + number, eagerness)) for number in (0, 10))
    async with running(prefiller) as prefill, running(decoder) as decode:
        for number, prompt in enumerate(prompts(seed, 4)):
            source = await prefilled(prefill, prompt)
            assert source.num_pages == (len(prompt) - 1) // decode.limits.page_size
            # Steps of another go on meanwhile, in both.
            other = [prompt[1], *prompt[::-1]]
            asked = [request_of(ask(10 + number, prompt), source), ask(20 + number, other)]

            async def answer(engine: Engine, request: object) -> list[int]:
                async with engine.submit(request) as stream:  # type: ignore[arg-type]
                    return (await stream.collect()).token_ids

            found = await asyncio.gather(
                *(answer(decode, one) for one in asked), answer(prefill, ask(30 + number, other))
            )
            expected = [expected_tokens(decoder.model, one) for one in (*asked, asked[1])]
            assert found == expected
        tally = exchange_of(decode).tally
        assert not tally.failures and tally.hit_tokens > 40 and not tally.recomputed_tokens


async def test_pages_of_what_drafts_go_along() -> None:
    """The model drafts for itself: it is always right where it has all of the prompt's keys and values."""
    limits = dataclasses.replace(LIMITS, max_draft_tokens=4)
    executors = [make(with_net(itself), limits, device=FakeDevice(number, 0.3)) for number in (5, 6)]
    async with running(executors[0], MODEL) as prefill, running(executors[1], MODEL) as decode:
        for number, prompt in enumerate(prompts(5, 4)):
            request = request_of(ask(number, prompt, 9), await prefilled(prefill, prompt))
            async with decode.submit(request) as stream:
                assert (await stream.collect()).token_ids == expected_tokens(executors[1].model, request)
        tally, counts = exchange_of(decode).tally, executors[1].counts
        assert not tally.failures and tally.hit_tokens > 40 and not tally.recomputed_tokens
        assert counts["accepted"] == counts["drafted"] > 10


async def test_after_sleep_the_memory_is_another() -> None:
    executors = [executor_of("full", FakeDevice(number)) for number in (3, 4)]
    async with running(executors[0]) as prefill, running(executors[1]) as decode:
        for engine in (prefill, decode):
            await engine.sleep(1)
            await engine.wake_up()
        prompt = prompts(3, 1)[0]
        request = request_of(ask(0, prompt), await prefilled(prefill, prompt))
        async with decode.submit(request) as stream:
            assert (await stream.collect()).token_ids == expected_tokens(executors[1].model, request)
        assert exchange_of(decode).tally.hit_tokens and not exchange_of(decode).tally.failures


def test_what_reads_host_memory_by_itself_is_refused() -> None:
    executor = executor_of("full", FakeDevice())
    connector = NixlConnector(lambda: None)
    try:
        with pytest.raises(
            StartupError, match=r"^--kv-transfer-config: NixlConnector: its peers read host memory, and"
        ):
            connector.register([executor.page_memory()])
    finally:
        connector.close()
        executor.close()

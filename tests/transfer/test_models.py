"""Prefill and decode apart under whole engines with real weights: what one goes on from gives the bits of one alone."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from engine.build import build_engine
from engine.config import LoraOptions, SpeculationOptions, TransferOptions
from engine.engine import Engine
from engine.request import RemotePages, Request, SamplingParams, Transfer
from engine.transfer.exchange import PageExchange
from tests.lora.handmade import factors, write
from tests.models.support import load
from tests.tiers.test_models import BUDGET, CASES, PAGE, Answer, checkpoints, config_of, prompt_of

__all__ = ["checkpoints"]
TRANSFER = TransferOptions(connector="TcpConnector", role="kv_both", receive_timeout_s=20.0)


@asynccontextmanager
async def running(checkpoint: Path, **options: Any) -> AsyncIterator[Engine]:
    engine = build_engine(config_of(checkpoint, None, **{"transfer": TRANSFER} | options)).engine
    task = asyncio.create_task(engine.run())
    try:
        yield engine
        await settled(engine)
        cache = engine.scheduler.kv_cache
        assert not engine.lending.lent and cache.num_available == cache.num_pages, "a page was not given back"
    finally:
        task.cancel()
        await asyncio.wait({task})
        engine.executor.close()


async def settled(engine: Engine) -> None:
    for _ in range(1000):
        if not exchange_of(engine)._kept and not exchange_of(engine)._tasks and engine.scheduler.is_empty:
            return
        await asyncio.sleep(0.005)
    raise AssertionError("somebody carries pages yet")


def exchange_of(engine: Engine) -> PageExchange:
    assert engine.transfer is not None
    return engine.transfer


async def ask(
    engine: Engine, prompt: list[int], adapter: str | None = None, source: RemotePages | None = None
) -> Answer:
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=0)
    found = None if adapter is None or engine.adapters is None else await engine.adapters.get(adapter)
    transfer = None if source is None else Transfer(source=source)
    request = Request("d", prompt, params, stream=False, adapter=found, transfer=transfer)
    async with engine.submit(request) as stream:
        told = await stream.collect()
    assert told.error is None
    return Answer(told.token_ids, [entry.logprob for entry in told.logprobs], stream.num_cached_tokens)


def request_of(request: Request, source: RemotePages) -> Request:
    """As a router sends it on."""
    return dataclasses.replace(request, transfer=Transfer(source=source))


async def prefilled(engine: Engine, prompt: list[int], adapter: str | None = None) -> RemotePages:
    """What a router would pass on."""
    found = None if adapter is None or engine.adapters is None else await engine.adapters.get(adapter)
    params = SamplingParams(max_tokens=1, temperature=0.0)
    request = Request("p", prompt, params, stream=False, adapter=found, transfer=Transfer(keep=True))
    async with engine.submit(request) as stream:
        assert len((await stream.collect()).token_ids) == 1
    told = stream.kv_transfer_params
    assert told is not None
    names = ("remote_engine_id", "remote_request_id", "remote_host", "remote_port")
    return RemotePages(*(told[name] for name in names), len(told["remote_block_ids"]))


def counts(engine: Engine) -> tuple[int, int, dict[str, int]]:
    """Tokens that were read, and computed instead, and why."""
    tally = exchange_of(engine).tally
    return tally.hit_tokens, tally.recomputed_tokens, dict(tally.failures)


@pytest.mark.parametrize("name", CASES)
async def test_what_was_read_is_what_would_have_been_computed(name: str, checkpoints: dict[str, Path]) -> None:
    """A prompt shorter than a chunk, one of several, and one of which the reader has the beginning already."""
    begin = prompt_of(150, 4)
    prompts = [prompt_of(BUDGET - 13, 1), prompt_of(230, 2), [*begin, *prompt_of(83, 3)]]
    async with running(checkpoints[name]) as alone:
        cold = [await ask(alone, prompt) for prompt in prompts]
    async with running(checkpoints[name]) as prefill, running(checkpoints[name]) as decode:
        await ask(decode, begin)
        for prompt, expected in zip(prompts, cold, strict=True):
            end = (len(prompt) - 1) // PAGE * PAGE
            before = counts(decode)[0]
            source = await prefilled(prefill, prompt)
            assert source.num_pages == end // PAGE
            cached = decode.scheduler.kv_cache.match_length(prompt)
            found = await ask(decode, prompt, source=source)
            assert found.same_bits(expected) and found.num_cached == end
            assert counts(decode) == (before + end - cached, 0, {})
        assert 128 <= cached <= 148, "the last one had a beginning"
        await settled(prefill)
        assert exchange_of(prefill).tally.let_go == {"read": 3}


async def test_pages_of_what_drafts_go_along(checkpoints: dict[str, Path]) -> None:
    """The model drafts for itself: it is always right where it has all of the prompt's keys and values."""
    drafts = SpeculationOptions("draft_model", str(checkpoints["full"]), num_draft_tokens=3, adaptive=False)
    prompt, options = prompt_of(230), {"seed": 1, "speculation": drafts}
    async with running(checkpoints["full"], **options) as prefill, running(checkpoints["full"], **options) as decode:
        cold = await ask(prefill, prompt)
        found = await ask(decode, prompt, source=await prefilled(prefill, prompt))
        assert found.same_bits(cold) and found.num_cached == 228 and counts(decode) == (228, 0, {})
        speculation = decode.scheduler.speculation
        assert speculation is not None and speculation.num_accepted_tokens == speculation.num_draft_tokens > 4


async def test_of_windows_only_what_is_seen_is_carried(checkpoints: dict[str, Path]) -> None:
    async with running(checkpoints["windows"]) as prefill, running(checkpoints["windows"]) as decode:
        prompt, moved = prompt_of(250), []
        source = await prefilled(prefill, prompt)
        connector = exchange_of(decode)._connector
        read = connector.read
        connector.read = lambda *given: moved.append(sum(map(len, given[1]))) or read(*given)  # type: ignore
        await ask(decode, prompt, source=source)
        groups, count = decode.limits.groups, 249 // PAGE
        assert moved == [sum(count - group.behind(count * PAGE, PAGE) for group in groups)] and moved[0] < 2 * count


async def test_a_state_that_is_lost_is_computed(checkpoints: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    """Others have its place, before it is read and while it is."""
    prompt, other = prompt_of(230), prompt_of(230, 5)
    async with running(checkpoints["state"]) as alone:
        cold = [await ask(alone, one) for one in (prompt, other)]
    async with running(checkpoints["state"]) as prefill, running(checkpoints["state"]) as decode:

        def lose() -> None:
            cache = prefill.scheduler.kv_cache
            for snapshot in cache._tree.snapshots():
                cache._tree._lose_snapshot(snapshot.node)

        source = await prefilled(prefill, prompt)
        lose()
        assert (await ask(decode, prompt, source=source)).same_bits(cold[0])
        assert counts(decode) == (0, 228, {"expired": 1})
        source = await prefilled(prefill, other)
        connector = exchange_of(decode)._connector
        read = connector.read

        def slow(*given: Any) -> Any:
            future = read(*given)
            future.result()
            lose()
            return future

        connector.read = slow  # type: ignore[method-assign]
        assert (await ask(decode, other, source=source)).same_bits(cold[1])
        assert counts(decode) == (0, 2 * 228, {"expired": 2})
        assert exchange_of(prefill).tally.let_go == {"lost": 2} and "(lost)" in caplog.text


async def test_a_prefill_without_a_state_to_give(checkpoints: dict[str, Path]) -> None:
    """It says so, and the reader computes, counts and logs it."""
    prompt = prompt_of(230)
    async with running(checkpoints["state"]) as prefill, running(checkpoints["state"]) as decode:
        prefill.scheduler.kv_cache._snapshots = None
        source = await prefilled(prefill, prompt)
        assert source.num_pages == 0 and not exchange_of(prefill)._kept
        await ask(decode, prompt, source=source)
        assert counts(decode) == (0, 228, {})


async def test_who_asks_for_less_or_more_than_is_kept(checkpoints: dict[str, Path]) -> None:
    """A client's word of how many there are: where an end alone serves nobody goes on elsewhere."""
    prompt = prompt_of(230)
    for name in ("windows", "state", "full"):
        async with running(checkpoints[name]) as alone:
            cold = await ask(alone, prompt)
        async with running(checkpoints[name]) as prefill, running(checkpoints[name]) as decode:
            source = dataclasses.replace(await prefilled(prefill, prompt), num_pages=30)
            assert (await ask(decode, prompt, source=source)).same_bits(cold)
            expected = (120, 108, {}) if name == "full" else (0, 228, {"mismatch": 1})
            assert counts(decode) == expected
            for kept in list(exchange_of(prefill)._kept):
                exchange_of(prefill)._let_go(kept, "read")


async def test_adapters_by_what_is_in_their_files(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    model = load(checkpoints["full"], max_adapters=2)
    for place in ("p", "d"):
        (tmp_path / place).mkdir()
    for number in (1, 2):
        for path in (tmp_path / "p" / f"a{number}", tmp_path / "d" / f"b{3 - number}"):
            write(path, factors(model.adapted, number, number), r=number)
    prompt, lora = prompt_of(230), LoraOptions(enable=True, root=str(tmp_path / "p"), max_loras=2)
    async with running(checkpoints["full"], lora=lora) as alone:
        cold = {name: await ask(alone, prompt, name) for name in (None, "a1", "a2")}
    assert len({str(one.logprobs) for one in cold.values()}) == 3
    theirs = dataclasses.replace(lora, root=str(tmp_path / "d"))
    async with running(checkpoints["full"], lora=lora) as prefill, running(checkpoints["full"], lora=theirs) as decode:
        hits = recomputed = failed = 0
        # Whatever they are called; and those that others computed are not taken.
        for kept, own, expected in (
            ("a1", "b2", "a1"),
            ("a2", "b1", "a2"),
            (None, None, None),
            ("a1", "b1", "a2"),
            (None, "b2", "a1"),
            ("a1", None, None),
        ):
            decode.flush_cache()
            source = await prefilled(prefill, prompt, kept)
            found = await ask(decode, prompt, own, source)
            assert found.same_bits(cold[expected])
            is_same = kept == expected
            hits, recomputed, failed = hits + 228 * is_same, recomputed + 228 * (not is_same), failed + (not is_same)
            assert found.num_cached == 228 * is_same
            assert counts(decode) == (hits, recomputed, {"adapter": failed} if failed else {})
        assert len(exchange_of(prefill)._kept) == 3
        for name in list(exchange_of(prefill)._kept):
            exchange_of(prefill)._let_go(name, "read")

"""The disk tier under the engine, on the fake device: what it reads back is what steps would have computed."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.config import CacheOptions, EngineConfig, SchedulerOptions, TierOptions
from engine.engine import Engine
from engine.executor.fake import FakeExecutor
from engine.executor.fake_oracle import FakeModel, expected_stream, expected_tokens
from engine.forward import Limits
from engine.request import Adapter, FinishReason, Request, SamplingParams
from engine.stream import Delta
from engine.tiers import tier as tier_module

VOCAB, PAGE, EOS = 1000, 16, 999
MODEL = FakeModel(VOCAB, EOS, 0.0)
PROMPT = np.random.default_rng(1).integers(0, 900, 390).tolist()
COUNT = 6


def ask(prompt: Sequence[int] = PROMPT, name: str = "a", namespace: str = "", **params: Any) -> Request:
    sampling = SamplingParams(temperature=0.0, max_tokens=COUNT, ignore_eos=True, **params)
    return Request(name, list(prompt), sampling, stream=False, namespace=namespace)


def reference(prompt: Sequence[int] = PROMPT) -> list[int]:
    return expected_tokens(MODEL, list(prompt), SamplingParams(temperature=0.0), COUNT, (EOS,))


@asynccontextmanager
async def running(
    directory: Path, *, num_pages: int = 128, max_bytes: int = 10**8, timeout_s: float = 5.0, weights: str = "v1"
) -> AsyncIterator[Engine]:
    limits = Limits(8, 512, 1024, PAGE, num_pages, VOCAB, max_adapters=2)
    executor = FakeExecutor(limits, MODEL)
    config = EngineConfig(
        cache=CacheOptions(),
        scheduler=SchedulerOptions(max_num_seqs=8, max_num_batched_tokens=512),
        tiers=TierOptions(directory, max_bytes, timeout_s),
        check_invariants=True,
    )
    engine = Engine(config, executor, None, eos_token_ids=(EOS,))
    engine.enable_tier(lambda other: weights if other is None else other.name)
    task = asyncio.create_task(engine.run())
    try:
        yield engine
        cache = engine.scheduler.kv_cache
        await settled(engine)
        assert not engine.lending.lent and cache.num_available == cache.num_pages, "a page was not given back"
    finally:
        task.cancel()
        await asyncio.wait({task})


async def settled(engine: Engine) -> None:
    """Nothing is on its way to or from the disk."""
    assert engine.tier is not None
    for _ in range(1000):
        if not engine.tier._jobs and engine.scheduler.is_empty:
            return
        await asyncio.sleep(0.005)
    raise AssertionError("the disk tier does not settle")


async def answer(engine: Engine, request: Request) -> tuple[Delta, int]:
    """With the tokens of its prompt that were cached."""
    async with engine.submit(request) as stream:
        delta = await stream.collect()
    return delta, stream.num_cached_tokens


async def asked(engine: Engine, request: Request, prompt: Sequence[int] = PROMPT) -> int:
    """Cached tokens of an answer that is right."""
    delta, num_cached = await answer(engine, request)
    assert delta.token_ids == reference(prompt)
    return num_cached


FILES = (len(PROMPT) - 1) // PAGE


async def test_a_restarted_engine_finds_its_prefixes(tmp_path: Path) -> None:
    async with running(tmp_path) as engine:
        assert await asked(engine, ask()) == 0
        await settled(engine)
        assert engine.tier is not None and len(engine.tier.store) == FILES
        # What is there is not written again.
        assert await asked(engine, ask(name="b")) == FILES * PAGE
        await settled(engine)
        written = engine.tier.worker.num_bytes_written
    async with running(tmp_path) as engine:
        assert engine.tier is not None
        assert await asked(engine, ask()) == FILES * PAGE
        assert engine.tier.tally.hit_tokens == FILES * PAGE and engine.tier.worker.num_bytes_read == written
        # From the cache from now on; and a longer prompt goes on behind what is there, and writes the rest.
        longer = [*PROMPT, *range(100)]
        assert await asked(engine, ask(longer, "b"), longer) == FILES * PAGE
        await settled(engine)
        assert len(engine.tier.store) == (len(longer) - 1) // PAGE
        text = engine.metrics.render().decode()
        assert f"oneloop_kv_disk_hit_tokens_total {FILES * PAGE}.0" in text
        assert f"oneloop_kv_disk_files {len(engine.tier.store)}.0" in text


async def test_a_page_that_was_evicted_comes_back(tmp_path: Path) -> None:
    async with running(tmp_path, num_pages=100) as engine:
        assert await asked(engine, ask()) == 0
        await settled(engine)
        for other in ([number, *PROMPT[1:]] for number in range(4)):
            assert await asked(engine, ask(other, "b"), other) == 0
            await settled(engine)
        assert engine.scheduler.kv_cache.match_length(PROMPT) < FILES * PAGE - tier_module.LEAST_TOKENS
        assert await asked(engine, ask(name="c")) == FILES * PAGE


async def test_many_at_once_read_once(tmp_path: Path) -> None:
    async with running(tmp_path) as engine:
        await asked(engine, ask())
        await settled(engine)
    tails = [[*PROMPT[:320], number, *range(40)] for number in range(6)]
    async with running(tmp_path) as engine:
        assert engine.tier is not None
        found = await asyncio.gather(*(asked(engine, ask(p, str(i)), p) for i, p in enumerate(tails)))
        assert found == [320] * 6 and engine.tier.tally.hit_tokens == 320


@pytest.mark.parametrize("change", ["weights", "namespace", "first token", "page size"])
async def test_what_is_another_is_not_found(tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(tmp_path) as engine:
        await asked(engine, ask())
        await settled(engine)
    if change == "page size":
        monkeypatch.setattr("tests.tiers.test_tier.PAGE", 8)
    async with running(tmp_path, weights="v2" if change == "weights" else "v1") as engine:
        prompt = [5, *PROMPT[1:]] if change == "first token" else PROMPT
        assert await asked(engine, ask(prompt, namespace="t" if change == "namespace" else ""), prompt) == 0
        assert engine.tier is not None and engine.tier.tally.hit_tokens == 0


async def test_a_damaged_page_ends_what_is_read(tmp_path: Path) -> None:
    async with running(tmp_path) as engine:
        await asked(engine, ask())
        await settled(engine)
        assert engine.tier is not None
        names = engine.tier._names.chain(ask())[1]
    path = tmp_path / names[10].hex()[:2] / f"{names[10].hex()[2:]}.page"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    async with running(tmp_path) as engine:
        assert engine.tier is not None
        assert await asked(engine, ask()) == 10 * PAGE
        assert engine.tier.tally.failures["read"] == 1 and engine.tier.store.num_corrupt == 1
        await settled(engine)
        # It was computed, and written anew.
        assert names[10] in engine.tier.store


async def test_a_slow_disk_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pages come in time, and serve; the third takes longer than the grace, and what it brings after all is not
    taken, for its page is another's by then."""
    async with running(tmp_path) as engine:
        await asked(engine, ask())
        await settled(engine)
    monkeypatch.setattr(tier_module, "_GRACE_S", 0.01)
    async with running(tmp_path, timeout_s=0.5) as engine:
        assert engine.tier is not None
        read, count, late = engine.tier.store.read, 0, threading.Event()

        def slow(name: bytes, into: Any) -> bool:
            nonlocal count
            count += 1
            if count == 3:
                late.wait(20)
            return read(name, into)

        monkeypatch.setattr(engine.tier.store, "read", slow)
        touched: list[Any] = []
        bring = engine.tier.worker._bring
        monkeypatch.setattr(engine.tier.worker, "_bring", lambda *given: touched.append(given) or bring(*given))
        assert await asked(engine, ask()) == 2 * PAGE
        assert not engine.lending.lent and engine.tier.worker.hangs and len(touched) == 2
        assert engine.tier.tally.failures == {"timeout": 1, "stuck": 1}
        assert not engine.tier.promises(ask(name="b")), "it would wait in vain"
        late.set()
        for _ in range(1000):
            if not engine.tier.worker.hangs:
                break
            await asyncio.sleep(0.005)
        assert not engine.tier.worker.hangs and len(touched) == 2 and count == 3
        engine.tier._timeout_s = 20.0
        engine.flush_cache()
        assert await asked(engine, ask(name="c")) == FILES * PAGE


async def test_others_go_on_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(tmp_path) as engine:
        await asked(engine, ask())
        await settled(engine)
    async with running(tmp_path) as engine:
        assert engine.tier is not None
        read, go = engine.tier.store.read, threading.Event()
        monkeypatch.setattr(engine.tier.store, "read", lambda name, into: go.wait(20) and read(name, into))
        waiting = asyncio.create_task(asked(engine, ask()))
        other = PROMPT[:50]
        assert await asked(engine, ask(other, "b"), other) == 0
        assert engine.scheduler.num_receiving == 1 and not waiting.done()
        go.set()
        assert await waiting == FILES * PAGE


async def test_an_abort_while_pages_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(tmp_path) as engine:
        await asked(engine, ask())
        await settled(engine)
    async with running(tmp_path) as engine:
        assert engine.tier is not None
        read, go = engine.tier.store.read, threading.Event()
        monkeypatch.setattr(engine.tier.store, "read", lambda name, into: go.wait(20) and read(name, into))
        async with engine.submit(ask()) as stream:
            await asyncio.sleep(0.01)
            engine.abort("a")
            delta = await stream.collect()
            assert delta.finish_reason is FinishReason.ABORT
        assert engine.scheduler.num_receiving == 0 and engine.lending.lent
        go.set()
        await settled(engine)
        # What came is there for the next.
        assert await asked(engine, ask(name="b")) == FILES * PAGE


async def test_no_room_is_no_harm(tmp_path: Path) -> None:
    """Half of the pages may be lent, and the prompt wants more: it is computed."""
    async with running(tmp_path, num_pages=200) as engine:
        await asked(engine, ask())
        await settled(engine)
    async with running(tmp_path, num_pages=30) as engine:
        assert engine.tier is not None
        assert await asked(engine, ask()) == 0
        assert engine.tier.tally.failures["room"] == 1


async def test_sleep_and_other_weights(tmp_path: Path) -> None:
    new = tmp_path / "v2"
    new.mkdir()
    async with running(tmp_path / "kv") as engine:
        await asked(engine, ask())
        await settled(engine)
        await engine.sleep(1)
        await engine.wake_up()
        assert await asked(engine, ask(name="b")) == FILES * PAGE
        await settled(engine)
        await engine.load_weights(new)
        before = engine.tier.tally.hit_tokens if engine.tier is not None else 0
        _, num_cached = await answer(engine, ask(name="c"))
        assert num_cached == 0
        assert engine.tier is not None and engine.tier.tally.hit_tokens == before


async def test_a_checkpoint_that_is_gone_stops_the_disk_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(tmp_path) as engine:
        assert engine.tier is not None

        def gone(other: Path | None) -> str:
            raise FileNotFoundError(2, "No such file or directory")

        monkeypatch.setattr(engine.tier, "_weights", gone)
        await engine.sleep(1)
        await engine.wake_up()
        assert not engine.sleep_level and engine.tier.is_paused and "are not carried" in caplog.text
        assert await asked(engine, ask()) == 0 and not len(engine.tier.store)


async def test_prompts_that_are_not_kept(tmp_path: Path) -> None:
    async with running(tmp_path) as engine:
        short = PROMPT[:100]
        await asked(engine, ask(short), short)
        await settled(engine)
        assert engine.tier is not None and not len(engine.tier.store)
        await asked(engine, ask(name="b"))
        await settled(engine)
    async with running(tmp_path) as engine:
        # All of its tokens are computed for their log-probabilities.
        assert await asked(engine, dataclasses.replace(ask(prompt_logprobs=1))) == 0


async def test_pages_of_an_adapter_are_found_by_what_is_in_its_files(tmp_path: Path) -> None:
    """Versions are numbers of a process: the first of one server is not the first of the next."""

    def write(name: str, content: str) -> Path:
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "adapter_config.json").write_text('{"r": 8}')
        (tmp_path / name / "weights").write_text(content)
        return tmp_path / name

    async def cached(engine: Engine, path: Path, version: int) -> int:
        weights = engine.executor.read_adapter(path)
        adapter = Adapter(path.name, str(path), version, 8, 1024, weights, weights.digest)
        delta, count = await answer(engine, dataclasses.replace(ask(name=f"v{version}"), adapter=adapter))
        sampling = SamplingParams(temperature=0.0)
        stream = expected_stream(MODEL, PROMPT, sampling, (EOS,), adapter=int(weights))  # type: ignore[call-overload]
        assert delta.token_ids == list(itertools.islice(stream, COUNT))
        await settled(engine)
        return count

    one, other = write("one", "1"), write("other", "2")
    async with running(tmp_path / "kv") as engine:
        assert await cached(engine, one, 1) == 0 == await cached(engine, other, 2)
        assert engine.tier is not None and len(engine.tier.store) == 2 * FILES
    async with running(tmp_path / "kv") as engine:
        assert await asked(engine, ask()) == 0
        assert await cached(engine, other, 1) == FILES * PAGE == await cached(engine, one, 2)
        # Loaded again with other weights under its name, and then with those that it had at first.
        assert await cached(engine, write("one", "3"), 3) == 0
        assert await cached(engine, write("one", "1"), 4) == FILES * PAGE


@pytest.mark.parametrize("way", ["read", "write"])
async def test_a_disk_that_hangs_holds_up_no_sleep(
    tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor other weights. Whenever it answers, the memory of that time is another's, and it carries on."""
    (tmp_path / "v2").mkdir()
    async with running(tmp_path / "kv") as engine:
        if way == "read":
            await asked(engine, ask())
    monkeypatch.setattr(tier_module, "_GRACE_S", 0.05)
    async with running(tmp_path / "kv", timeout_s=0.1) as engine:
        assert engine.tier is not None
        tier, go, hung = engine.tier, threading.Event(), threading.Event()
        inner, touched = getattr(tier.worker.disk, way), []

        def hang(name: bytes, row: Any) -> Any:
            hung.set()
            assert go.wait(20)
            return inner(name, row)

        monkeypatch.setattr(tier.worker.disk, way, hang)
        assert await asked(engine, ask()) == 0
        await asyncio.to_thread(hung.wait, 20)
        # What is read was given up when it was late.
        assert bool(engine.lending.lent) == (way == "write")
        await engine.sleep(1)
        assert not engine.lending.lent and tier.tally.failures["stuck"] == 1
        assert ("are given up" in caplog.text) == (way == "write")
        await engine.wake_up()
        await engine.load_weights(tmp_path / "v2")
        # Nobody waits for what does not come.
        assert tier.worker.hangs and not tier.promises(ask(name="b"))
        await answer(engine, ask(name="b"))
        assert not tier._jobs
        for name in ("_bring", "_take"):
            monkeypatch.setattr(tier.worker, name, lambda *given: touched.append(given))
        go.set()
        for _ in range(1000):
            if not tier.worker.hangs:
                break
            await asyncio.sleep(0.005)
        assert not tier.worker.hangs and not touched, "the memory was touched for what was given up"
        monkeypatch.undo()
        tier._timeout_s = 20.0
        await answer(engine, ask(name="c"))
        await settled(engine)
        engine.flush_cache()
        _, num_cached = await answer(engine, ask(name="d"))
        assert num_cached == FILES * PAGE

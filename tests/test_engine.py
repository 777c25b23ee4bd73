"""The engine loop on the fake device: streams, stop strings, aborts, failures, draining. No HTTP, no torch."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import gc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

import engine.demo
from engine.config import CacheOptions, EngineConfig, SchedulerOptions, StreamOptions
from engine.engine import Engine
from engine.executor.fake import FakeExecutor
from engine.executor.fake_oracle import FakeModel, expected_tokens
from engine.forward import DeviceLostError, ForwardError, Limits
from engine.publisher import Listener
from engine.request import FinishReason, QueueFullError, Request, SamplingParams, UnavailableError
from engine.scheduling.sequence import Sequence
from engine.stream import Delta, TokenStream
from engine.text.detokenizer import IncrementalDetokenizer
from engine.text.tokenizer import Tokenizer
from tests.sim.workload import Runs

TOKENIZER = Tokenizer.load(Path(engine.demo.__path__[0]))
VOCAB = TOKENIZER.vocab_size
EOS = TOKENIZER.eos_token_ids[0]
MODEL = FakeModel(VOCAB, EOS, 0.0)


@asynccontextmanager
async def running(
    *,
    overlap: bool = True,
    jump_ahead: bool = True,
    max_queued: int = 100,
    max_num_seqs: int = 8,
    flush_interval_ms: float = 0.0,
    fail_on: Callable[[int], None] | None = None,
    step_seconds: float = 0.0,
) -> AsyncIterator[Engine]:
    limits = Limits(max_num_seqs, 256, 256, 16, 256, VOCAB)
    executor = FakeExecutor(limits, MODEL, fail_on=fail_on, step_seconds=step_seconds)
    config = EngineConfig(
        cache=CacheOptions(),
        scheduler=SchedulerOptions(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=256,
            max_queued_requests=max_queued,
            overlap=overlap,
            jump_ahead=jump_ahead,
        ),
        stream=StreamOptions(flush_interval_ms=flush_interval_ms),
    )
    engine = Engine(config, executor, TOKENIZER, eos_token_ids=(EOS,))
    task = asyncio.create_task(engine.run())
    try:
        yield engine
    finally:
        task.cancel()
        await asyncio.wait({task})


def ask(name: str, prompt: list[int], *, stream: bool = True, **params: object) -> Request:
    params = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True, **params}
    return Request(name, prompt, SamplingParams(**params), stream=stream)  # type: ignore[arg-type]


def reference(prompt: list[int], count: int = 12) -> list[int]:
    return expected_tokens(MODEL, prompt, SamplingParams(temperature=0.0), count, (EOS,))


def text_of(prompt: list[int], tokens: list[int]) -> str:
    detokenizer = IncrementalDetokenizer(TOKENIZER, prompt, SamplingParams())
    return detokenizer.push(tokens) + detokenizer.finish()


async def collect(stream: TokenStream) -> Delta:
    async with stream:
        return await stream.collect()


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("flush_interval_ms", [0.0, 1e6])
async def test_streamed_equals_unstreamed_equals_the_model(overlap: bool, flush_interval_ms: float) -> None:
    async with running(overlap=overlap, flush_interval_ms=flush_interval_ms) as engine:
        prompts = [[10 + i, 20, 30] for i in range(6)]
        streamed = [collect(engine.submit(ask(f"s{i}", p))) for i, p in enumerate(prompts)]
        whole = [collect(engine.submit(ask(f"w{i}", p, stream=False))) for i, p in enumerate(prompts)]
        answers = await asyncio.gather(*streamed, *whole)
    for prompt, one, other in zip(prompts, answers[:6], answers[6:], strict=True):
        assert one.token_ids == other.token_ids == reference(prompt)
        assert one.text == other.text == text_of(prompt, one.token_ids)
        assert one.finish_reason is other.finish_reason is FinishReason.LENGTH


async def test_each_delta_comes_as_soon_as_its_token_when_nothing_is_held() -> None:
    async with running() as engine, engine.submit(ask("a", [1, 2, 3])) as stream:
        sizes = [len(delta.token_ids) async for delta in stream]
    assert sum(sizes) == 12 and max(sizes) <= 2, "one step at a time, and the last two together at most"


async def test_long_flush_interval_sends_the_first_and_the_last_token_at_once() -> None:
    async with running(flush_interval_ms=1e6) as engine, engine.submit(ask("a", [1, 2, 3])) as stream:
        sizes = [len(delta.token_ids) async for delta in stream]
    assert sizes[0] == 1 and len(sizes) == 2 and sum(sizes) == 12


@pytest.mark.parametrize("stream", [True, False])
async def test_stop_string_ends_the_text_before_it(stream: bool) -> None:
    prompt = [5, 6, 7]
    text = text_of(prompt, reference(prompt))
    stop = text[len(text) // 2 :][:3]
    async with running() as engine:
        answer = await collect(engine.submit(ask("a", prompt, stream=stream, stop=(stop,))))
        assert answer.text == text[: text.index(stop)]
        assert (answer.finish_reason, answer.stop_reason) == (FinishReason.STOP, stop)
        assert len(answer.token_ids) < 12
        await engine.drained()
        assert engine.scheduler.kv_cache.num_available == 256


async def test_leaving_the_block_aborts_within_a_step() -> None:
    async with running(step_seconds=0.001) as engine:
        async with engine.submit(ask("a", [1, 2], max_tokens=200)) as stream:
            await stream.take()
            assert engine.scheduler.num_running == 1
        assert engine.scheduler.num_running == 0
        await engine.drained()
        assert not engine.scheduler.has_work and engine.stats().num_used_pages == 0
        engine.abort("a")
        engine.abort("never was")


async def test_abort_while_waiting_and_by_name() -> None:
    async with running(max_num_seqs=1, step_seconds=0.001) as engine:
        first = engine.submit(ask("first", [1], max_tokens=50))
        second = engine.submit(ask("second", [2]))
        await first.take()
        assert engine.stats().num_waiting == 1
        engine.abort("second")
        assert (await second.take()).finish_reason is FinishReason.ABORT
        engine.abort("first")
        assert (await first.collect()).finish_reason is FinishReason.ABORT
        await engine.drained()


async def test_full_queue_and_drain_refuse_at_the_door() -> None:
    async with running(max_num_seqs=1, max_queued=2, step_seconds=0.001) as engine:
        running_stream = engine.submit(ask("a", [1], max_tokens=20))
        await running_stream.take()
        waiting = [engine.submit(ask(name, [2])) for name in ("b", "c")]
        with pytest.raises(QueueFullError):
            engine.submit(ask("d", [3]))
        engine.drain()
        with pytest.raises(UnavailableError):
            engine.submit(ask("e", [3]))
        answers = await asyncio.gather(*(stream.collect() for stream in [running_stream, *waiting]))
        assert all(answer.finish_reason is FinishReason.LENGTH for answer in answers)
        await engine.drained()


async def test_failed_step_is_one_batchs_error_and_the_engine_goes_on() -> None:
    ended = asyncio.Event()

    def fail(step: int) -> None:
        if step >= 2 and not ended.is_set():
            raise ForwardError("out of memory")

    async with running(fail_on=fail) as engine:
        answer = await collect(engine.submit(ask("a", [1, 2, 3])))
        assert answer.finish_reason is FinishReason.ERROR
        assert answer.error is not None and "out of memory" not in answer.error
        ended.set()
        after = await collect(engine.submit(ask("b", [1, 2, 3])))
        assert after.token_ids == reference([1, 2, 3]) and not engine.failed


async def test_lost_device_ends_every_stream_and_the_loop() -> None:
    limits = Limits(4, 64, 64, 16, 64, VOCAB)

    class Lost(FakeExecutor):
        async def wait(self, handle: object) -> object:  # type: ignore[override]
            raise DeviceLostError("illegal memory access")

    engine = Engine(
        EngineConfig(scheduler=SchedulerOptions(max_num_seqs=4)), Lost(limits, MODEL), TOKENIZER, eos_token_ids=(EOS,)
    )
    streams = [engine.submit(ask(str(i), [i, 1])) for i in range(6)]
    with pytest.raises(DeviceLostError):
        await engine.run()
    answers = await asyncio.gather(*(stream.collect() for stream in streams))
    assert all(a.finish_reason is FinishReason.ERROR and a.error and "device was lost" in a.error for a in answers)
    assert engine.failed
    with pytest.raises(UnavailableError):
        engine.submit(ask("late", [1]))


async def test_burst_reports_cached_tokens_and_metrics_add_up() -> None:
    system = list(range(100, 180))
    async with running() as engine:
        streams = [engine.submit(ask(f"r{i}", [*system, i], max_tokens=4)) for i in range(8)]
        await asyncio.gather(*(stream.collect() for stream in streams))
        assert [s.num_cached_tokens for s in streams] == [0] + [80] * 7
        assert all(s.num_prompt_tokens == 81 and s.num_output_tokens == 4 for s in streams)
        stats = engine.stats()
        assert (stats.num_running, stats.num_waiting) == (0, 0)
        metrics = engine.metrics
        assert metrics.generation_tokens == 32 and metrics.prompt_tokens == 8 * 81
        assert metrics.prefix_cache_hits == 7 * 80 and metrics.finished[FinishReason.LENGTH] == 8
        assert engine.flush_cache()
        again = engine.submit(ask("again", [*system, 1], max_tokens=1))
        await again.collect()
        assert again.num_cached_tokens == 0


async def test_unseeded_requests_differ_and_seeded_ones_agree() -> None:
    async with running() as engine:
        requests = [ask(f"u{i}", [1, 2], temperature=1.0) for i in range(4)]
        requests += [ask(f"s{i}", [1, 2], temperature=1.0, seed=5) for i in range(3)]
        answers = await asyncio.gather(*(collect(engine.submit(request)) for request in requests))
    outputs = [tuple(answer.token_ids) for answer in answers]
    assert len(set(outputs[:4])) > 1 and len(set(outputs[4:])) == 1


async def test_heartbeat_stands_still_only_while_work_does() -> None:
    async with running() as engine:
        assert engine.seconds_since_progress() == 0.0
        await collect(engine.submit(ask("a", [1])))
        await engine.drained()
        assert engine.seconds_since_progress() == 0.0
        assert not engine.flush_cache() or engine.scheduler.has_work is False


class Alternating:
    """A constraint: even ids at even places, odd ones at odd places, and an end after `length` tokens."""

    def __init__(self, length: int, broken_at: int = -1, wrong_at: int = -1, free_until: int = 0) -> None:
        self.seen: list[int] = []
        self.length, self.broken_at, self.wrong_at, self.free_until = length, broken_at, wrong_at, free_until

    def copy(self) -> Alternating:
        other = copy.copy(self)
        other.seen = [*self.seen]
        return other

    def mask_into(self, mask: np.ndarray) -> None:
        if len(self.seen) == self.broken_at:
            raise ValueError("planned")
        mask.fill(0xAAAAAAAA if len(self.seen) % 2 else 0x55555555)

    def forced_tokens(self) -> list[int]:
        return []

    def accept(self, token_id: int) -> None:
        self.seen.append(token_id)

    @property
    def is_free(self) -> bool:
        return len(self.seen) < self.free_until

    @property
    def is_finished(self) -> bool:
        return len(self.seen) >= self.length or self.error is not None

    @property
    def error(self) -> str | None:
        return "it grew too complex" if len(self.seen) == self.wrong_at else None


@pytest.mark.parametrize("overlap", [True, False])
async def test_constrained_rows_sample_under_their_masks_and_others_do_not_notice(overlap: bool) -> None:
    async with running(overlap=overlap) as engine:
        plain = ask("plain", [1, 2, 3])
        bound = [
            dataclasses.replace(ask(f"c{i}", [1, 2, 3, i], max_tokens=9), constraint=Alternating(7 if i else 100))
            for i in range(4)
        ]
        answers = await asyncio.gather(*(collect(engine.submit(request)) for request in [plain, *bound]))
        await engine.drained()
        assert engine.stats().num_used_pages == 0
    assert answers[0].token_ids == reference([1, 2, 3])
    assert [len(answer.token_ids) for answer in answers[1:]] == [9, 7, 7, 7]
    for answer in answers[1:]:
        assert [token % 2 for token in answer.token_ids] == [place % 2 for place in range(len(answer.token_ids))]
    assert answers[1].finish_reason is FinishReason.LENGTH and answers[2].finish_reason is FinishReason.STOP


async def test_last_token_under_a_grammar_keeps_its_logprob() -> None:
    async with running() as engine:
        request = dataclasses.replace(ask("a", [1, 2, 3], logprobs=0), constraint=Alternating(5))
        answer = await collect(engine.submit(request))
    assert [entry.token_id for entry in answer.logprobs] == answer.token_ids and len(answer.token_ids) == 5


async def test_broken_grammar_is_one_requests_error() -> None:
    async with running() as engine:
        broken = dataclasses.replace(ask("broken", [5, 6]), constraint=Alternating(50, broken_at=3))
        bad, good = await asyncio.gather(collect(engine.submit(broken)), collect(engine.submit(ask("good", [1, 2]))))
        assert bad.finish_reason is FinishReason.ERROR and bad.error == "The grammar of this request failed."
        assert good.token_ids == reference([1, 2]) and not engine.failed
        stuck = dataclasses.replace(ask("stuck", [5, 6]), constraint=Alternating(50, wrong_at=3))
        bad = await collect(engine.submit(stuck))
        assert bad.finish_reason is FinishReason.ERROR
        assert bad.error == "The grammar of this request failed: it grew too complex." and bad.status == 400


async def test_a_grammar_that_has_not_begun_allows_everything() -> None:
    async with running() as engine:
        bound = dataclasses.replace(ask("free", [1, 2, 3], max_tokens=9), constraint=Alternating(100, free_until=4))
        answer = await collect(engine.submit(bound))
    assert answer.token_ids[:4] == reference([1, 2, 3])[:4] and len(answer.token_ids) == 9
    assert [token % 2 for token in answer.token_ids[4:]] == [0, 1, 0, 1, 0]


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("flush_interval_ms", [0.0, 1e6])
async def test_forced_tokens_are_the_same_and_cost_no_steps(overlap: bool, flush_interval_ms: float) -> None:
    """Also where they are cut by the length, by a stop id and by the grammar's own end, and one that cannot jump."""
    probes: list[tuple[dict[str, object], dict[str, int]]] = [
        ({"max_tokens": 40}, {"free": 2, "run": 9, "length": 1000}),
        ({"max_tokens": 40}, {"free": 0, "run": 7, "length": 25}),
        ({"max_tokens": 17}, {"free": 1, "run": 30, "length": 1000}),
        ({"max_tokens": 40, "stop_token_ids": (Runs(5, VOCAB, free=1, run=8, length=99).token_at(5),)},
         {"free": 1, "run": 8, "length": 99}),
        ({"max_tokens": 40, "logprobs": 0}, {"free": 1, "run": 6, "length": 1000}),
        ({"max_tokens": 40, "presence_penalty": 1.0}, {"free": 3, "run": 6, "length": 1000}),
    ]  # fmt: skip
    outcomes = []
    for jump_ahead in (False, True):
        running_options = {"overlap": overlap, "jump_ahead": jump_ahead, "flush_interval_ms": flush_interval_ms}
        async with running(**running_options) as engine:  # type: ignore[arg-type]
            requests = [ask("plain", [1, 2, 3], max_tokens=10)]
            for number, (params, runs) in enumerate(probes):
                for stream in (True, False):
                    request = ask(f"{number}{stream}", [number, 9], stream=stream, **params)
                    bound = dataclasses.replace(request, constraint=Runs(5, VOCAB, **runs))
                    requests.append(bound)
            answers = [await collect(engine.submit(request)) for request in requests]
            await engine.drained()
            assert engine.stats().num_used_pages == 0
            assert engine.metrics.generation_tokens == sum(len(answer.token_ids) for answer in answers)
            outcomes.append((answers, engine.executor.num_steps))  # type: ignore[attr-defined]
    (without, many), (jumped, few) = outcomes
    assert jumped == without
    # Log-probabilities and penalties see every token.
    assert few < 0.6 * many, f"{few} steps where token by token takes {many}"
    assert [len(answer.token_ids) for answer in jumped[1::2][:3]] == [40, 25, 17]
    for streamed, whole in zip(jumped[1::2], jumped[2::2], strict=True):
        assert streamed == whole
    assert all(len(answer.logprobs) == 40 for answer in jumped[9:11])


async def test_forced_tokens_come_at_once_and_stop_strings_are_found_in_them() -> None:
    def bound(name: str, **params: object) -> Request:
        request = ask(name, [5, 6], max_tokens=34, **params)
        return dataclasses.replace(request, constraint=Runs(3, VOCAB, free=1, run=30, length=1000))

    async with running() as engine:
        async with engine.submit(bound("whole")) as stream:
            deltas = [delta async for delta in stream]
        # The first token and all that it brings with it.
        assert len(deltas[0].token_ids) == 31
        text = "".join(delta.text for delta in deltas)
        stop = text[len(text) // 2 :][:4]
        cut = await collect(engine.submit(bound("cut", stop=(stop,))))
        assert cut.text == text[: text.index(stop)] and cut.stop_reason == stop
        # What follows the stop string was never generated.
        assert cut.token_ids == deltas[0].token_ids[: len(cut.token_ids)] and len(cut.token_ids) < 31


async def test_text_cut_amid_a_character_ends_before_it() -> None:
    """The fake's tokens are drawn; a constraint writes an emoji, whose bytes are several tokens, and is cut short."""
    emoji = TOKENIZER.encode("🦜", add_special_tokens=False)
    assert len(emoji) > 1, "a character of several tokens is needed"

    class Spell(Alternating):
        def mask_into(self, mask: np.ndarray) -> None:
            mask.fill(0)
            token = emoji[len(self.seen) % len(emoji)]
            mask[token // 32] = 1 << (token % 32)

    async with running() as engine:
        whole = dataclasses.replace(ask("whole", [1, 2], max_tokens=len(emoji)), constraint=Spell(99))
        cut = dataclasses.replace(ask("cut", [1, 2], max_tokens=2 * len(emoji) - 1), constraint=Spell(99))
        answers = await asyncio.gather(*(collect(engine.submit(request)) for request in (whole, cut)))
    assert [answer.text for answer in answers] == ["🦜", "🦜"]


async def test_what_a_request_leaves_goes_without_the_collector() -> None:
    """Else prompts and answers stay until everything is gone through, which stalls the loop."""
    text = text_of([5, 6, 7], reference([5, 6, 7]))
    async with running(step_seconds=0.001) as engine:
        gc.collect()
        gc.disable()
        try:
            others = set(map(id, gc.get_objects()))
            names = ["streams", "stops", "bound", "late"]
            requests = [ask(name, [5, 6, 7], stream=name != "stops") for name in names]
            requests[1] = ask("stops", [5, 6, 7], stop=(text[len(text) // 2 :][:3],))
            requests[2] = dataclasses.replace(requests[2], constraint=Alternating(5))
            requests[3] = dataclasses.replace(ask("late", [8], max_tokens=200), timeout_s=0.02)
            ends = [
                answer.finish_reason for answer in await asyncio.gather(*map(collect, map(engine.submit, requests)))
            ]
            assert ends.count(FinishReason.ERROR) == 1 and None not in ends
            async with engine.submit(ask("leaves", [1, 2], max_tokens=200)) as stream:
                await stream.take()
            await engine.drained()
            del stream, requests
            await asyncio.sleep(0)
            kinds = Sequence | Listener | TokenStream
            left = [one for one in gc.get_objects() if isinstance(one, kinds) and id(one) not in others]
        finally:
            gc.enable()
    assert not left

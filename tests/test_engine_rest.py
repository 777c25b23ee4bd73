"""The engine at rest, and out of time: pause, sleep, new weights, and timeouts by a clock that is moved by hand."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from engine.clock import ManualClock
from engine.config import EngineConfig, SchedulerOptions, StartupError, StreamOptions
from engine.engine import Engine
from engine.executor.base import StepHandle
from engine.executor.fake import FakeExecutor
from engine.forward import DeviceLostError, ForwardOutput, Limits
from engine.request import FinishReason, RequestError, UnavailableError
from tests.test_engine import EOS, MODEL, TOKENIZER, VOCAB, ask, collect, reference

HERE = Path(__file__).parent


class Gated(FakeExecutor):
    """A device of which no step ends while the gate is closed."""

    gate: asyncio.Event
    broken = False

    async def wait(self, handle: StepHandle) -> ForwardOutput:
        await self.gate.wait()
        if self.broken:
            raise DeviceLostError("planned")
        return await super().wait(handle)


@dataclasses.dataclass
class Rig:
    engine: Engine
    device: Gated
    clock: ManualClock

    async def turns(self, count: int = 20) -> None:
        """Let the loop do what it can."""
        for _ in range(count):
            await asyncio.sleep(0)


@asynccontextmanager
async def rig(max_num_seqs: int = 8, **options: object) -> AsyncIterator[Rig]:
    limits = Limits(max_num_seqs, 256, 256, 16, 64, VOCAB)
    device, clock = Gated(limits, MODEL), ManualClock(100.0)
    device.gate = asyncio.Event()
    device.gate.set()
    scheduler = SchedulerOptions(**{"max_num_seqs": max_num_seqs, "max_num_batched_tokens": 256, **options})  # type: ignore[arg-type]
    config = EngineConfig(scheduler=scheduler, stream=StreamOptions(flush_interval_ms=0.0))
    engine = Engine(config, device, TOKENIZER, eos_token_ids=(EOS,), clock=clock)
    task = asyncio.create_task(engine.run())
    try:
        async with asyncio.timeout(60.0):
            yield Rig(engine, device, clock)
    finally:
        device.gate.set()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60.0):
        while not condition():  # noqa: ASYNC110  (what is waited for has no event)
            await asyncio.sleep(0)


# ---- time


async def test_a_request_that_waits_too_long_is_unavailable_and_one_that_runs_is_not() -> None:
    async with rig(max_num_seqs=1, queue_timeout_s=5.0) as r:
        r.device.gate.clear()
        running, waiting = r.engine.submit(ask("a", [1])), r.engine.submit(ask("b", [2]))
        await r.turns()
        r.clock.advance(4.9)
        assert not waiting.finished
        r.clock.advance(0.2)
        delta = await waiting.collect()
        assert (delta.finish_reason, delta.status) == (FinishReason.ERROR, 503) and "5 seconds" in (delta.error or "")
        assert r.engine.metrics.rejected == {"queue_timeout": 1}
        r.device.gate.set()
        assert (await collect(running)).token_ids == reference([1])


@pytest.mark.parametrize(
    ("own", "servers", "ends_at"), [(3.0, None, 3.0), (None, 2.0, 2.0), (3.0, 2.0, 2.0), (1.0, 2.0, 1.0)]
)
async def test_the_shorter_of_two_timeouts_ends_a_request(
    own: float | None, servers: float | None, ends_at: float
) -> None:
    async with rig(request_timeout_s=servers) as r:
        r.device.gate.clear()
        stream = r.engine.submit(dataclasses.replace(ask("a", [1]), timeout_s=own))
        await r.turns()
        r.clock.advance(ends_at - 0.01)
        assert not stream.finished
        r.clock.advance(0.02)
        delta = await stream.collect()
        assert (delta.finish_reason, delta.status) == (FinishReason.ERROR, 504)
        r.device.gate.set()
        await r.engine.drained()
        assert r.engine.scheduler.kv_cache.num_available == 64


async def test_a_timeout_amid_the_answer_keeps_what_was_sent() -> None:
    async with rig() as r:
        stream = r.engine.submit(dataclasses.replace(ask("a", [1, 2], max_tokens=200), timeout_s=60.0))
        sent: list[int] = []
        while len(sent) < 40:
            sent += (await stream.take()).token_ids
        r.device.gate.clear()
        r.clock.advance(61.0)
        rest = await stream.collect()
        assert rest.status == 504 and rest.finish_reason is FinishReason.ERROR
        r.device.gate.set()
        await r.engine.drained()
        # Its pages were computed well, and serve the next.
        again = r.engine.submit(ask("b", [1, 2, *sent], max_tokens=1))
        await again.collect()
        assert again.num_cached_tokens == 32 and sent == reference([1, 2], len(sent))


async def test_timers_end_with_their_requests_and_a_request_without_a_limit_has_none() -> None:
    async with rig(queue_timeout_s=5.0) as r:
        await collect(r.engine.submit(dataclasses.replace(ask("a", [1]), timeout_s=50.0)))
        live = [timer for _, _, timer in r.clock._timers if timer.callback is not None]
        assert not live
    async with rig() as r:
        await collect(r.engine.submit(ask("a", [1])))
        assert not r.clock._timers


async def test_a_queue_deadline_holds_while_the_engine_is_paused() -> None:
    async with rig(queue_timeout_s=5.0) as r:
        await r.engine.pause()
        waiting = r.engine.submit(ask("a", [1]))
        r.clock.advance(6.0)
        assert (await waiting.collect()).status == 503
        await r.engine.resume()


# ---- pause


@pytest.mark.parametrize("mode", ["abort", "wait", "keep"])
async def test_pause_and_resume(mode: str) -> None:
    async with rig() as r:
        running = r.engine.submit(ask("a", [1, 2], max_tokens=40))
        await running.take()
        r.device.gate.clear()
        pausing = asyncio.create_task(r.engine.pause(mode))
        await r.turns()
        late = r.engine.submit(ask("late", [3]))
        await r.turns()
        assert not pausing.done(), "a step is in flight"
        r.clock.advance(70.0)
        assert r.engine.seconds_since_progress() >= 70.0, "a pause hides no stall"
        r.device.gate.set()
        await pausing
        r.clock.advance(70.0)
        steps = r.device.num_steps
        await r.turns()
        assert r.engine.is_paused and r.device.num_steps == steps and not late.finished
        assert r.engine.seconds_since_progress() == 0.0
        if mode == "abort":
            assert (await running.collect()).finish_reason is FinishReason.ABORT
        elif mode == "wait":
            assert running.finished and running.num_output_tokens == 40
        else:
            assert not running.finished
        await r.engine.resume()
        assert (await late.collect()).token_ids == reference([3])
        if mode == "keep":
            assert (await running.collect()).finish_reason is FinishReason.LENGTH
            assert running.num_output_tokens == 40


async def test_whoever_gives_up_waiting_for_a_pause_leaves_the_engine_running() -> None:
    async with rig() as r:
        r.device.gate.clear()
        running = r.engine.submit(ask("a", [1]))
        pausing = asyncio.create_task(r.engine.pause("wait"))
        await r.turns()
        held = r.engine.submit(ask("b", [2]))
        pausing.cancel()
        await asyncio.gather(pausing, return_exceptions=True)
        r.device.gate.set()
        for stream, prompt in ((running, [1]), (held, [2])):
            assert (await stream.collect()).token_ids == reference(prompt)
        assert not r.engine.is_paused


async def test_aborts_reach_those_that_a_pause_holds() -> None:
    async with rig() as r:
        await r.engine.pause()
        stream = r.engine.submit(ask("a", [1]))
        r.engine.abort("a")
        assert (await stream.collect()).finish_reason is FinishReason.ABORT
        await r.engine.resume()
        await r.engine.drained()
        assert (await collect(r.engine.submit(ask("b", [1])))).token_ids == reference([1])


async def test_a_drain_ends_a_pause() -> None:
    async with rig() as r:
        await r.engine.pause()
        stream = r.engine.submit(ask("a", [1]))
        r.engine.drain()
        assert (await stream.collect()).token_ids == reference([1])
        await r.engine.drained()


@pytest.mark.parametrize("held_by", ["keep", "abort", "sleep"])
async def test_nobody_waits_for_those_that_are_held(held_by: str) -> None:
    async with rig() as r:
        kept = r.engine.submit(ask("a", [1], max_tokens=40))
        await kept.take()
        await (r.engine.sleep(1, "keep") if held_by == "sleep" else r.engine.pause(held_by))
        if held_by == "abort":
            kept = r.engine.submit(ask("b", [1], max_tokens=40))
        with pytest.raises(RequestError, match="paused amid its requests"):
            await r.engine.pause("wait")
        await (r.engine.wake_up() if held_by == "sleep" else r.engine.resume())
        assert (await kept.collect()).finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("rest", ["wait", "keep", "sleep"])
async def test_a_drain_ends_a_rest_that_is_still_to_come(rest: str) -> None:
    async with rig() as r:
        r.device.gate.clear()
        running = r.engine.submit(ask("a", [1]))
        await r.turns()
        coming = r.engine.sleep(1, "wait") if rest == "sleep" else r.engine.pause(rest)
        resting = asyncio.create_task(coming)
        await r.turns()
        late = r.engine.submit(ask("b", [2])) if rest != "sleep" else None
        r.engine.drain()
        await r.turns()
        r.device.gate.set()
        with pytest.raises(UnavailableError, match="shutting down"):
            await resting
        assert (await running.collect()).token_ids == reference([1])
        assert late is None or (await late.collect()).token_ids == reference([2])
        await r.engine.drained()
        assert not r.engine.is_paused and not r.engine.sleep_level


async def test_whoever_gives_up_waiting_for_a_step_leaves_the_engine_running() -> None:
    async with rig() as r:
        r.device.gate.clear()
        running = r.engine.submit(ask("a", [1]))
        await r.turns()
        pausing = asyncio.create_task(r.engine.pause("keep"))
        await r.turns()
        pausing.cancel()
        await asyncio.gather(pausing, return_exceptions=True)
        r.device.gate.set()
        assert (await running.collect()).token_ids == reference([1]) and not r.engine.is_paused


async def test_an_engine_that_fails_leaves_nobody_waiting_for_a_pause() -> None:
    async with rig() as r:
        r.device.gate.clear()
        stream = r.engine.submit(ask("a", [1]))
        await r.turns()
        pausing = asyncio.create_task(r.engine.pause("keep"))
        await r.turns()
        r.device.broken = True
        r.device.gate.set()
        with pytest.raises(UnavailableError):
            await pausing
        assert (await stream.collect()).finish_reason is FinishReason.ERROR


# ---- sleep


@pytest.mark.parametrize("level", [1, 2])
async def test_sleep_frees_every_page_and_what_is_kept_goes_on_after_it(level: int) -> None:
    async with rig() as r:
        kept = r.engine.submit(ask("a", [1, 2], max_tokens=40))
        await kept.take()
        await r.engine.sleep(level, "keep")
        assert r.engine.sleep_level == r.device.sleep_level == level
        assert r.engine.scheduler.kv_cache.num_free == 64
        with pytest.raises(UnavailableError, match="asleep"):
            r.engine.submit(ask("b", [1]))
        await r.engine.sleep(level, "abort")  # nothing more happens
        with pytest.raises(RequestError, match="wake it up first"):
            await r.engine.sleep(3 - level)
        await r.engine.wake_up()
        await r.engine.wake_up()
        rest = await kept.collect()
        assert rest.finish_reason is FinishReason.LENGTH and kept.num_output_tokens == 40
        assert rest.token_ids == reference([1, 2], 40)[40 - len(rest.token_ids) :]


@pytest.mark.parametrize("level", [1, 2])
async def test_weights_wake_up_first_and_others_come_before_there_is_a_cache(level: int) -> None:
    async with rig() as r:
        await r.engine.sleep(level)
        with pytest.raises(RequestError, match="asleep"):
            await r.engine.load_weights(HERE)
        await r.engine.wake_up(["weights"])
        await r.engine.wake_up(["weights"])  # nothing more happens
        assert r.engine.sleep_level == level and r.device.asleep == {"kv_cache"}
        await r.engine.load_weights(HERE, version="new")
        assert r.device.weights == HERE
        with pytest.raises(UnavailableError, match="asleep"):
            r.engine.submit(ask("a", [1]))
        await r.engine.wake_up(["kv_cache"])
        assert not r.engine.sleep_level and r.engine.weight_version == "new"
        assert (await collect(r.engine.submit(ask("b", [1])))).token_ids == reference([1])


async def test_parts_are_released_one_after_the_other_and_who_is_held_goes_on() -> None:
    async with rig() as r:
        kept = r.engine.submit(ask("a", [1, 2], max_tokens=40))
        await kept.take()
        with pytest.raises(RequestError, match="pause the engine"):
            await r.engine.release(["kv_cache"])
        assert not r.engine.sleep_level
        await r.engine.pause("keep")
        await r.engine.release(["kv_cache"])
        assert r.device.asleep == {"kv_cache"} and r.engine.scheduler.kv_cache.num_free == 64
        await r.engine.release()
        assert r.device.asleep == {"kv_cache", "weights"}
        await r.engine.wake_up(["kv_cache"])
        await r.engine.resume()
        await r.turns()
        assert r.engine.sleep_level == 1 and not kept.finished
        await r.engine.wake_up()
        rest = await kept.collect()
        assert rest.token_ids == reference([1, 2], 40)[40 - len(rest.token_ids) :]


async def test_a_pause_outlives_a_sleep() -> None:
    async with rig() as r:
        await r.engine.pause()
        await r.engine.sleep()
        await r.engine.wake_up()
        stream = r.engine.submit(ask("a", [1]))
        await r.turns()
        assert not stream.finished and r.engine.is_paused
        await r.engine.resume()
        assert (await stream.collect()).token_ids == reference([1])


async def test_a_sleep_that_fails_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(level: int, parts: object) -> None:
        raise StartupError("planned")

    async with rig() as r:
        monkeypatch.setattr(r.device, "sleep", fail)
        with pytest.raises(StartupError):
            await r.engine.sleep()
        assert (await collect(r.engine.submit(ask("a", [1])))).token_ids == reference([1])


async def test_a_caller_that_leaves_does_not_stop_a_sleep_half_way() -> None:
    async with rig() as r:
        r.device.gate.clear()
        running = r.engine.submit(ask("a", [1], max_tokens=40))
        await r.turns()
        sleeping = asyncio.create_task(r.engine.sleep(1, "wait"))
        await r.turns()
        sleeping.cancel()
        await asyncio.gather(sleeping, return_exceptions=True)
        r.device.gate.set()
        assert (await running.collect()).finish_reason is FinishReason.LENGTH
        await until(lambda: r.device.sleep_level == 1)
        await r.engine.wake_up()
        assert (await collect(r.engine.submit(ask("b", [1])))).token_ids == reference([1])


async def test_a_drain_ends_what_sleeps() -> None:
    async with rig() as r:
        kept = r.engine.submit(ask("a", [1], max_tokens=40))
        await kept.take()
        await r.engine.sleep(1, "keep")
        r.engine.drain()
        assert (await kept.collect()).finish_reason is FinishReason.ABORT
        await r.engine.drained()


# ---- weights


async def test_new_weights_wait_for_those_that_are_here_and_forget_the_cache() -> None:
    async with rig() as r:
        prompt = list(range(40))
        await collect(r.engine.submit(ask("a", prompt)))
        r.device.gate.clear()
        running = r.engine.submit(ask("b", [1]))
        await r.turns()
        loading = asyncio.create_task(r.engine.load_weights(HERE, version="7"))
        await r.turns()
        late = r.engine.submit(ask("late", prompt))
        await r.turns()
        assert r.device.weights is None
        r.device.gate.set()
        await loading
        assert running.finished and running.num_output_tokens == 12
        assert r.device.weights == HERE and r.engine.weight_version == "7"
        assert (await late.collect()).finish_reason is FinishReason.LENGTH and late.num_cached_tokens == 0


async def test_weights_that_cannot_be_used_leave_the_old_ones_serving() -> None:
    async with rig() as r:
        with pytest.raises(StartupError):
            await r.engine.load_weights(Path("/no/such/place"), version="7")
        assert r.engine.weight_version == "default"
        assert (await collect(r.engine.submit(ask("a", [1])))).token_ids == reference([1])
        kept = r.engine.submit(ask("b", [1], max_tokens=40))
        await kept.take()
        await r.engine.pause("keep")
        with pytest.raises(RequestError, match="paused amid its requests"):
            await r.engine.load_weights(HERE)
        await r.engine.load_weights(HERE, abort=True)
        assert (await kept.collect()).finish_reason is FinishReason.ABORT and r.engine.is_paused
        await r.engine.sleep(2)
        with pytest.raises(RequestError, match="asleep"):
            await r.engine.load_weights(HERE)
        await r.engine.wake_up()
        assert r.device.weights == HERE

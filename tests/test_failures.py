"""Failure domains: what breaks in one request ends that request alone; what breaks in a step, whoever broke it."""

from __future__ import annotations

import asyncio
import dataclasses
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import pytest

from engine.books import check
from engine.config import EngineConfig, SchedulerOptions, StartupError
from engine.engine import Engine, StalledError
from engine.executor.fake import FakeExecutor
from engine.executor.faults import FaultyExecutor, parse_faults
from engine.forward import Limits
from engine.request import FinishReason
from engine.scheduling.trials import MAX_FAILURES
from engine.stream import Delta
from engine.watchdog import EXIT_CODE, Deadline, Watchdog
from tests.test_engine import EOS, MODEL, TOKENIZER, VOCAB, Alternating, ask, collect, reference

# A token that only the culprit's prompt has.
MARK = 77


class Panic(BaseException):
    """What a library that is written in Rust raises: no Exception."""


async def serve(
    spec: str, requests: list[Any], tamper: Callable[[Engine], None] | None = None, max_num_seqs: int = 8
) -> tuple[Engine, Any]:
    """Ask all at once; the engine, and the answers in order."""
    limits = Limits(max_num_seqs, 256, 256, 16, 256, VOCAB)
    executor = FakeExecutor(limits, MODEL)
    device: Any = FaultyExecutor(executor, parse_faults(spec)) if spec else executor
    config = EngineConfig(scheduler=SchedulerOptions(max_num_seqs=max_num_seqs, max_num_batched_tokens=256))
    engine = Engine(config, device, TOKENIZER, eos_token_ids=(EOS,))
    task = asyncio.create_task(engine.run())
    try:
        streams = [engine.submit(request) for request in requests]
        if tamper is not None:
            tamper(engine)
        answers = await asyncio.wait_for(asyncio.gather(*(collect(stream) for stream in streams)), 30)
        if not task.done():
            await engine.drained()
            assert engine.stats().num_used_pages == 0
            check(engine.scheduler.kv_cache, [])
    finally:
        task.cancel()
        await asyncio.wait({task})
    return engine, answers


PROMPTS = [[10 + number, 20, 30] for number in range(6)]


def check_others(answers: list[Delta], culprit: int) -> None:
    for number, answer in enumerate(answers):
        if number != culprit:
            assert answer.token_ids == reference(PROMPTS[number]), f"request {number} was hurt"


def break_detokenizer(where: str, error: type[BaseException]) -> Callable[[Engine], None]:
    def tamper(engine: Engine) -> None:
        class Broken:
            stop_reason = None

            def push(self, token_ids: list[int]) -> str:
                if where == "push":
                    raise error("planned")
                return "x"

            def finish(self) -> str:
                raise error("planned")

        engine.publisher.listeners["r2"].detokenizer = Broken()  # type: ignore[assignment]

    return tamper


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("error", [ValueError, Panic])
@pytest.mark.parametrize("where", ["push", "finish"])
async def test_a_detokenizer_that_breaks_is_one_requests_error(
    where: str, error: type[BaseException], stream: bool
) -> None:
    requests = [ask(f"r{number}", prompt, stream=stream) for number, prompt in enumerate(PROMPTS)]
    engine, answers = await serve("", requests, break_detokenizer(where, error))
    check_others(answers, 2)
    assert answers[2].finish_reason is FinishReason.ERROR and "planned" not in answers[2].error
    assert engine.metrics.failures == {"text": 1}
    assert b'oneloop_request_failures_total{domain="text"} 1.0' in engine.metrics.render()


@pytest.mark.parametrize("error", [ValueError, Panic])
async def test_a_grammar_that_panics_is_one_requests_error(error: type[BaseException]) -> None:
    class Broken(Alternating):
        def mask_into(self, mask: Any) -> None:
            raise error("planned")

    requests = [ask(f"r{number}", prompt) for number, prompt in enumerate(PROMPTS)]
    requests[3] = dataclasses.replace(requests[3], constraint=Broken(9))
    engine, answers = await serve("", requests)
    check_others(answers, 3)
    assert answers[3].error == "The grammar of this request failed." and engine.metrics.failures == {"grammar": 1}


async def test_logprobs_that_break_are_one_requests_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(sequence: Any, output: Any, index: int, token: int) -> None:
        if sequence.request.request_id == "r1":
            raise IndexError("planned")
        attach(sequence, output, index, token)

    from engine import publisher

    attach = publisher._attach_logprob
    monkeypatch.setattr(publisher, "_attach_logprob", fail)
    requests = [ask(f"r{number}", prompt, logprobs=0) for number, prompt in enumerate(PROMPTS)]
    engine, answers = await serve("", requests)
    check_others(answers, 1)
    assert answers[1].finish_reason is FinishReason.ERROR and engine.metrics.failures == {"logprobs": 1}
    assert all(len(answer.logprobs) == 12 for number, answer in enumerate(answers) if number != 1)


@pytest.mark.parametrize("kind", ["raise", "oom", "nan", "corrupt"])
@pytest.mark.parametrize("culprit", [0, 3, 5])
async def test_only_the_culprit_of_a_step_ends(kind: str, culprit: int) -> None:
    prompts = [*PROMPTS]
    prompts[culprit] = [*prompts[culprit], MARK]
    requests = [ask(f"r{number}", prompt) for number, prompt in enumerate(prompts)]
    engine, answers = await serve(f"{kind}:token={MARK}", requests)
    check_others(answers, culprit)
    assert answers[culprit].finish_reason is FinishReason.ERROR and not answers[culprit].token_ids
    domain = "forward" if kind in ("raise", "oom") else "not_a_number"
    assert engine.metrics.failures == {domain: 1}
    assert engine.metrics.failed_steps <= (6 if domain == "forward" else 0)


@pytest.mark.parametrize("kind", ["raise", "oom"])
@pytest.mark.parametrize("culprits", [range(3), range(7), range(9, 16), range(15), range(0, 16, 2), range(16)], ids=str)
async def test_culprits_beside_each_other_hurt_nobody_else(kind: str, culprits: range) -> None:
    prompts = [[10 + number, 20, 30] + [MARK] * (number in culprits) for number in range(16)]
    requests = [ask(f"r{number}", prompt) for number, prompt in enumerate(prompts)]
    engine, answers = await serve(f"{kind}:token={MARK}", requests, max_num_seqs=16)
    for number, answer in enumerate(answers):
        if number in culprits:
            assert answer.finish_reason is FinishReason.ERROR and not answer.token_ids
        else:
            assert answer.token_ids == reference(prompts[number]), f"request {number} was hurt"
    assert engine.metrics.failures == {"forward": len(culprits)} and not engine.failed


async def test_a_step_that_fails_once_hurts_nobody() -> None:
    """Whoever was in it passes when it is tried again."""
    requests = [ask(f"r{number}", prompt) for number, prompt in enumerate(PROMPTS)]
    engine, answers = await serve("raise:step=3;oom:step=9", requests)
    check_others(answers, -1)
    assert engine.metrics.failed_steps == 2 and not engine.metrics.failures


@pytest.mark.parametrize("kind", ["raise", "oom"])
@pytest.mark.parametrize("seed", range(4))
async def test_faults_that_pass_hurt_nobody(kind: str, seed: int) -> None:
    """Also those of steps with one sequence, and those that strike amid the trials of another."""
    requests = [ask(f"r{number}", prompt) for number, prompt in enumerate(PROMPTS)]
    for some in (requests, requests[:1]):
        engine, answers = await serve(f"{kind}:p=0.1;seed={seed}", some)
        check_others(answers, -1)
        assert not engine.metrics.failures


async def test_who_fails_alone_is_tried_again_before_it_is_guilty() -> None:
    for times in range(3):
        # Every other step was launched before the one that failed, and is not looked at.
        spec = ";".join(f"raise:step={step}" for step in (2, 4, 6)[: times + 1])
        engine, [answer] = await serve(spec, [ask("r0", PROMPTS[0])])
        assert engine.metrics.failed_steps == times + 1
        assert (answer.finish_reason is FinishReason.ERROR) == (times == 2), spec
        if times < 2:
            assert answer.token_ids == reference(PROMPTS[0])


async def test_a_device_that_fails_every_step_ends_everybody_soon() -> None:
    requests = [ask(f"r{number}", prompt) for number, prompt in enumerate(PROMPTS)]
    engine, answers = await serve("raise:p=1", requests)
    assert all(answer.finish_reason is FinishReason.ERROR for answer in answers)
    # Of each that is judged, the next one may have been launched already.
    assert engine.metrics.failed_steps <= 2 * (MAX_FAILURES + len(requests)) and not engine.failed


async def test_a_lost_device_tells_every_stream() -> None:
    engine, answers = await serve("lost:step=4", [ask(f"r{number}", prompt) for number, prompt in enumerate(PROMPTS)])
    assert engine.failed and all("device was lost" in (answer.error or "") for answer in answers)


async def test_slow_steps_change_nothing() -> None:
    requests = [ask(f"r{number}", prompt) for number, prompt in enumerate(PROMPTS)]
    _, answers = await serve("slow:p=0.5,s=0.001;seed=3", requests)
    check_others(answers, -1)


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("", "names no fault"),
        ("explode:p=1", "'explode' is none of slow, hang"),
        ("raise", "does not say when"),
        ("raise:q=1", "'q' is none of"),
        ("raise:p=often", "p is no number: 'often'"),
        ("raise:p=2", "p is from 0 to 1"),
        ("slow:p=1,s=-1", "and s seconds"),
        ("slow:p=1,s=nan", "and s seconds"),
        ("nan:step=1.5", "step is no number"),
        ("seed=x;raise:p=1", "seed is no number"),
    ],
)
def test_specs_that_are_none(spec: str, told: str) -> None:
    with pytest.raises(StartupError, match="--debug-faults") as caught:
        parse_faults(spec)
    assert told in str(caught.value)


async def test_a_loop_that_breaks_tells_every_stream_and_raises() -> None:
    limits = Limits(8, 256, 256, 16, 256, VOCAB)
    engine = Engine(EngineConfig(scheduler=SchedulerOptions(max_num_seqs=8)), FakeExecutor(limits, MODEL), TOKENIZER)
    streams = [engine.submit(ask(f"r{number}", prompt)) for number, prompt in enumerate(PROMPTS)]

    def fail(*_: object) -> None:
        raise AssertionError("planned")

    engine.scheduler.commit = fail  # type: ignore[method-assign, assignment]
    with pytest.raises(AssertionError, match="planned"):
        await engine.run()
    answers = [await stream.collect() for stream in streams]
    assert all(answer.error == "The engine failed: internal error" for answer in answers)
    assert engine.failed


@pytest.mark.parametrize("whole", [True, False])
async def test_wrong_books_are_begun_anew_and_requests_go_on(whole: bool) -> None:
    limits = Limits(8, 256, 256, 16, 256, VOCAB)
    config = EngineConfig(scheduler=SchedulerOptions(max_num_seqs=8), check_invariants=whole)
    engine = Engine(config, FakeExecutor(limits, MODEL), TOKENIZER, eos_token_ids=(EOS,))
    task = asyncio.create_task(engine.run())
    prompt = list(range(100, 140))
    try:
        first = await collect(engine.submit(ask("first", prompt)))
        await engine.drained()
        assert engine.metrics.kv_violations == 0
        child = next(iter(engine.scheduler.kv_cache._tree.roots()[0].children.values()))
        child.lock_count += 1
        engine._books.checked_at = -1e9
        second = await collect(engine.submit(ask("second", prompt)))
        await engine.drained()
        assert engine.metrics.kv_violations == 1 and engine.scheduler.kv_cache.num_free == 256
        engine._books.checked_at = -1e9
        third = await collect(engine.submit(ask("third", prompt)))
        await engine.drained()
        assert engine.metrics.kv_violations == 1
        assert first.token_ids == second.token_ids == third.token_ids == reference(prompt)
    finally:
        task.cancel()
        await asyncio.wait({task})


async def test_a_stall_is_told_once_and_ends_every_stream() -> None:
    limits = Limits(8, 256, 256, 16, 256, VOCAB)
    device: Any = FaultyExecutor(FakeExecutor(limits, MODEL), parse_faults("hang:step=2"))
    engine = Engine(EngineConfig(scheduler=SchedulerOptions(max_num_seqs=8)), device, TOKENIZER)
    loop, codes = asyncio.get_running_loop(), []
    with tempfile.TemporaryFile("w+") as out:
        watchdog = Watchdog(
            engine.seconds_since_progress,
            0.05,
            stop=lambda: loop.call_soon_threadsafe(engine.give_up),
            end=codes.append,
            out=out,
        )
        watchdog.start()
        stream = engine.submit(ask("a", [1, 2, 3]))
        with pytest.raises(StalledError):
            await asyncio.wait_for(engine.run(), 30)
        answer = await stream.collect()
        assert answer.error == "The engine failed: the device does not answer" and engine.failed
        watchdog.close()
        out.seek(0)
        assert out.read().count("Current thread") == 1
    assert watchdog.num_stalls == 1 and not codes


def test_a_loop_that_hangs_itself_is_ended() -> None:
    codes: list[int] = []
    with tempfile.TemporaryFile("w+") as out:
        watchdog = Watchdog(lambda: 9.0, 0.01, stop=lambda: None, end=codes.append, out=out, grace_s=0.01)
        watchdog.start()
        watchdog._thread.join(30)
    assert codes == [EXIT_CODE]


# Where there are namespaces for everybody, a process that is number 1 in one of its own.
UNSHARE = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child")


def leave(program: str, *under: str) -> subprocess.CompletedProcess[str]:
    """A process that has to be gone within 0.1 s and has something else in mind."""
    before = "import sys, threading, time\nfrom engine import watchdog\ndeadline = watchdog.Deadline()\n"
    command = [*under, sys.executable, "-c", before + program]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=60)


def may_unshare() -> bool:
    try:
        return subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def test_a_process_that_does_not_leave_is_ended_and_says_why() -> None:
    ended = leave(
        "threading.Thread(target=time.sleep, args=(1e6,), name='export').start()\n"
        "deadline.within(1e6)\ndeadline.within(0.1, 3)\nsys.exit(0)"
    )
    assert ended.returncode == 3
    assert "(MainThread, export)" in ended.stderr and "most recent call first" in ended.stderr


@pytest.mark.parametrize("number", ["any", "1"])
def test_a_process_that_holds_the_lock_of_python_is_ended(number: str) -> None:
    """Also the first of a container, to which nothing happens that signals do by default."""
    if number == "1" and not may_unshare():
        pytest.skip("no namespaces of processes here")
    program = f"import re\nwatchdog.GRACE_S = 0.2\ndeadline.within(0.1)\nre.match(r'(x+)+y', {'x' * 100!r})"
    if number == "1":
        program = "import os\nassert os.getpid() == 1\n" + program
    ended = leave(program, *(UNSHARE if number == "1" else ()))
    assert ended.returncode == signal.SIGALRM
    assert re.search(r"most recent call first.*in match", ended.stderr, re.S)


@pytest.mark.parametrize("seconds", [30.0, 1e18])
def test_a_process_that_leaves_in_time_is_left_alone(seconds: float) -> None:
    """Also where --drain-timeout means for ever: that is more than timers can count."""
    ended = leave(f"deadline.within({seconds})\ntime.sleep(0.1)")
    assert (ended.returncode, ended.stderr) == (0, "")


def test_the_earliest_deadline_counts() -> None:
    codes: list[int] = []
    with tempfile.TemporaryFile("w+") as out:
        deadline = Deadline(end=codes.append, out=out)
        for seconds in (1e6, 0.01, 1e6):
            deadline.within(seconds, 5)
        assert deadline._thread is not None
        deadline._thread.join(30)
    assert codes == [5]

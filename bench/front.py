"""The process that `bench.http` measures: the whole server over a fake device that says a story at once, or at a rate.

Speaks JSON lines: reads what to measure from its arguments, says its port, waits until all streams run, measures for
a while, says what it saw, and serves on until its standard input ends; a line there asks what a bare write costs.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import gc
import json
import logging
import os
import queue
import resource
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

import engine.demo
from engine.config import CacheOptions, EngineConfig, SchedulerOptions, ServerOptions, StreamOptions
from engine.engine import Engine
from engine.executor.base import StepHandle
from engine.executor.fake import FakeExecutor, FakeHandle
from engine.forward import ForwardOutput, Limits, StepLogprobs
from engine.metrics import EngineMetrics
from engine.models.generation import GenerationDefaults
from engine.models.registry import read_spec
from engine.process import settle
from engine.publisher import Publisher
from engine.scheduling.batch import StepResult
from engine.scheduling.scheduler import Scheduler
from engine.text.chat_template import ChatTemplate
from engine.text.detokenizer import IncrementalDetokenizer
from engine.text.tokenizer import Tokenizer
from server.answers.openai import OpenAIAnswer
from server.app import ServedModel, build_app
from server.serving import serve
from server.sse import EventStream

DEMO = Path(engine.demo.__file__).parent
STORY = (
    "Once upon a time, in a big castle, there lived a gentle fox called Lena. Lena loved cake very much. One day Lena "
    'found a blue bike on the road. "What a nice bike!" said Lena. A monkey named Mark came by and looked sad. '
)
PAGE_SIZE = 16
# Of a chat's event with a chunk's size before it.
EVENT_BYTES = 250
# What runs is given so long to settle (the pace of the streams, too) before it is measured.
SETTLE_S = 1.5


class Teller(FakeExecutor):
    """The fake device, which looks at nothing and says the story: a step of 256 rows costs it some 10 us.

    A thread says when a step is done, as for a real device: timers of the loop count whole milliseconds from the
    beginning of its turn, which is some milliseconds ago where a turn wrote to many streams.
    """

    def __init__(self, limits: Limits, story: list[int], logprobs: int | None, **options: Any) -> None:
        super().__init__(limits, compute=False, **options)
        self._story = np.array(story, np.int32)
        self._num_logprobs = logprobs
        self._alarms: queue.SimpleQueue[tuple[float, asyncio.Future[None]]] = queue.SimpleQueue()
        threading.Thread(target=self._wake, name="device", daemon=True).start()

    async def wait(self, handle: StepHandle) -> ForwardOutput:
        assert isinstance(handle, FakeHandle)
        if handle.done_at > time.monotonic():
            done = asyncio.get_running_loop().create_future()
            self._alarms.put((handle.done_at, done))
            await done
        return self.resolve(handle)

    def _wake(self) -> None:
        while True:
            at, done = self._alarms.get()
            time.sleep(max(0.0, at - time.monotonic()))
            with contextlib.suppress(RuntimeError):  # the loop has ended
                done.get_loop().call_soon_threadsafe(_finish, done)

    def _run(self, handle: FakeHandle) -> None:
        step = handle.forward_input
        staging, rows = step.staging, step.num_rows
        output = self._outputs[handle.step % 2][:rows]
        # Every stream is somewhere else in the story.
        places = staging.row_start[:rows] + staging.row_len[:rows] + 7 * staging.row_slot[:rows]
        self._story.take(places, out=output, mode="wrap")
        output[~staging.row_samples[:rows]] = -1
        handle.output = ForwardOutput(output, handle.step)
        if self._num_logprobs is not None:
            sampled = np.flatnonzero(staging.row_samples[:rows]).astype(np.int32)
            top = np.zeros((len(sampled), self._num_logprobs), np.float32) - 1.5
            ids = (output[sampled][:, None] + np.arange(self._num_logprobs)) % self.limits.vocab_size
            handle.output.logprobs = StepLogprobs(
                sampled, np.full(len(sampled), -0.5, np.float32), np.ones(len(sampled), np.int32), ids, top
            )


def _finish(done: asyncio.Future[None]) -> None:
    if not done.done():
        done.set_result(None)


class Spread:
    """When steps were published, and when all of their events had been written, as the server sees it: nobody's reading
    is in that. Loop thread."""

    def __init__(self) -> None:
        self.watching = False
        self._began: list[float] = []
        self._ended: list[float] = []
        self._used: list[float] = []

    def watch(self) -> None:
        name = "publish"
        publish = getattr(Publisher, name)

        def timed(publisher: Publisher, result: StepResult) -> None:
            began, used = time.perf_counter(), time.thread_time()
            publish(publisher, result)
            if self.watching:
                # The loop writes at the end of a turn what was sent in it.
                asyncio.get_running_loop().call_soon(self._on_written, began, used)

        setattr(Publisher, name, timed)

    def _on_written(self, began: float, used: float) -> None:
        self._began.append(began)
        self._ended.append(time.perf_counter())
        self._used.append(time.thread_time() - used)

    def percentiles(self) -> dict[str, list[float]]:
        """Median, 99th and most, in seconds: from step to step; from a step to the end of its writes; what the loop's
        thread computed in that time, the rest of which it waited for a processor or Python's lock; from one such end
        to the next."""
        began, ended = np.array(self._began), np.array(self._ended)
        found = {
            "steps": np.diff(began),
            "writing": ended - began,
            "own": np.array(self._used),
            "waiting": ended - began - np.array(self._used),
            "ends": np.diff(ended),
        }
        return {name: np.percentile(of, [50, 99, 100]).tolist() for name, of in found.items() if len(of)}


class Stages:
    """Seconds inside of named functions, without those of named functions that they call. Loop thread only."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}
        self._inner = [0.0]

    def watch(self, owner: type, name: str, stage: str) -> None:
        """Take the time of a method from now on; a version of the server that has none of that name has none."""
        if hasattr(owner, name):
            setattr(owner, name, self.timed(getattr(owner, name), stage))

    def timed(self, work: Callable[..., Any], stage: str) -> Callable[..., Any]:
        self.seconds.setdefault(stage, 0.0)
        self.calls.setdefault(stage, 0)
        clock, inner = time.perf_counter, self._inner

        @functools.wraps(work)
        def call(*args: Any, **kwargs: Any) -> Any:
            inner.append(0.0)
            began = clock()
            try:
                return work(*args, **kwargs)
            finally:
                took = clock() - began
                self.seconds[stage] += took - inner.pop()
                inner[-1] += took
                self.calls[stage] += 1

        return call

    def overhead(self) -> float:
        """Seconds that one call costs by being watched."""
        probe = Stages()
        watched, count = probe.timed(int, "nothing"), 20_000
        began = time.perf_counter()
        for _ in range(count):
            watched()
        return (time.perf_counter() - began) / count


def watch_stages() -> Stages:
    stages = Stages()
    stages.watch(Teller, "submit", "device")
    stages.watch(Teller, "resolve", "device")
    stages.watch(Scheduler, "schedule", "commit")
    stages.watch(Scheduler, "commit", "commit")
    stages.watch(Publisher, "attach", "queue")
    stages.watch(Publisher, "publish", "queue")
    stages.watch(IncrementalDetokenizer, "push", "detokenise")
    stages.watch(OpenAIAnswer, "delta", "encode")
    stages.watch(EventStream, "send", "write")
    return stages


def reading(engine: Engine) -> dict[str, float]:
    """Where the loop thread and the engine stand."""
    usage = resource.getrusage(resource.RUSAGE_THREAD)
    return {
        "wall": time.perf_counter(),
        "user": usage.ru_utime,
        "system": usage.ru_stime,
        "cpu": time.thread_time(),
        "tokens": float(engine.metrics.generation_tokens),
        "steps": float(engine.metrics.num_steps),
    }


def make_engine(args: argparse.Namespace, words: Tokenizer) -> Engine:
    streams, length = args.streams, args.max_model_len
    limits = Limits(
        max_num_seqs=streams,
        max_num_batched_tokens=max(2048, 2 * streams),
        max_model_len=length,
        page_size=PAGE_SIZE,
        num_pages=streams * (-(-length // PAGE_SIZE) + 1),
        vocab_size=words.vocab_size,
    )
    device = Teller(
        limits,
        words.encode(STORY, add_special_tokens=False),
        args.logprobs,
        step_seconds=1.0 / args.rate if args.rate else 0.0,
    )
    given = {} if args.flush_interval_ms is None else {"flush_interval_ms": args.flush_interval_ms}
    config = EngineConfig(
        cache=CacheOptions(page_size=PAGE_SIZE, num_pages=limits.num_pages),
        scheduler=SchedulerOptions(max_num_seqs=streams, max_num_batched_tokens=limits.max_num_batched_tokens),
        stream=StreamOptions(**given),
        server=ServerOptions(port=0, drain_timeout_s=1.0),
    )
    metrics = EngineMetrics(model_name="demo", max_model_len=length)
    return Engine(config, device, words, eos_token_ids=words.eos_token_ids, metrics=metrics)


def write_cost(rounds: int = 20) -> float:
    """CPU seconds of one bare write of an event's size to an open stream, whose client waits for it."""
    transports = [one for one in gc.get_objects() if type(one).__name__ == "TCPTransport"]
    files = [one.get_extra_info("socket").fileno() for one in transports if not one.is_closing()]
    data = b"%x\r\n%b\r\n" % (EVENT_BYTES, b":" + b" " * (EVENT_BYTES - 3) + b"\n\n")
    costs = []
    for _ in range(rounds):
        began = time.thread_time()
        for file in files:
            os.write(file, data)
        costs.append((time.thread_time() - began) / max(1, len(files)))
        # As long as a step takes; the clients read and sleep again.
        time.sleep(0.02)
    return statistics.median(costs)


def say(**line: object) -> None:
    print(json.dumps(line), flush=True)


async def measure(engine: Engine, args: argparse.Namespace, stages: Stages | None, spread: Spread | None) -> None:
    """Wait for the streams, let them settle, look twice."""
    while engine.stats().num_running < args.streams:  # noqa: ASYNC110  (what is waited for has no event)
        await asyncio.sleep(0.05)
    say(event="running", process=os.getpid())
    await asyncio.sleep(SETTLE_S)
    before = reading(engine)
    if stages is not None:
        stages.seconds = dict.fromkeys(stages.seconds, 0.0)
        stages.calls = dict.fromkeys(stages.calls, 0)
    if spread is not None:
        spread.watching = True
    say(event="begin")
    await asyncio.sleep(args.seconds)
    after = reading(engine)
    seen: dict[str, object] = {name: after[name] - before[name] for name in after}
    if stages is not None:
        overhead = stages.overhead()
        seen["stages"] = {
            name: max(0.0, seconds - overhead * stages.calls[name]) for name, seconds in stages.seconds.items()
        }
    if spread is not None:
        seen["spread"] = spread.percentiles()
    say(event="end", **seen)


async def serve_until(engine: Engine, max_model_len: int, answer: Callable[[], bool]) -> None:
    """Say the port, and serve until the standard input ends. answer: called for each line that comes there; False ends
    it, too."""
    model = ServedModel(
        names=("demo",),
        created=1_700_000_000,
        chat_template=ChatTemplate.load(DEMO),
        generation_defaults=GenerationDefaults(),
        model_config=read_spec(DEMO),
        max_model_len=max_model_len,
    )
    options = engine.config.server
    settle()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_word() -> None:
        if not answer():
            stop.set()

    loop.add_reader(sys.stdin.fileno(), on_word)
    serving = loop.create_task(engine.run())
    await serve(
        build_app(engine, model, options),
        engine,
        options,
        on_listening=lambda _, port: say(event="listening", port=port),
        stop=stop,
    )
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)


async def run(args: argparse.Namespace, stages: Stages | None, spread: Spread | None) -> None:
    engine = make_engine(args, Tokenizer.load(DEMO))

    def answer() -> bool:
        if not os.read(sys.stdin.fileno(), 4096):
            return False
        say(event="write", seconds=write_cost())
        return True

    measuring = asyncio.create_task(measure(engine, args, stages, spread))
    await serve_until(engine, args.max_model_len, answer)
    measuring.cancel()
    await asyncio.gather(measuring, return_exceptions=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.front", description=__doc__)
    parser.add_argument("--streams", type=int, required=True)
    parser.add_argument("--rate", type=float, default=0.0, help="tokens a second of each stream; 0: as fast as may be")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--max-model-len", type=int, default=32768)
    parser.add_argument("--logprobs", type=int)
    parser.add_argument("--flush-interval-ms", type=float)
    parser.add_argument("--stages", action="store_true")
    parser.add_argument("--spread", action="store_true")
    args = parser.parse_args()
    logging.basicConfig(level="WARNING")
    spread = Spread() if args.spread else None
    if spread is not None:
        spread.watch()
    uvloop.run(run(args, watch_stages() if args.stages else None, spread))


if __name__ == "__main__":
    main()

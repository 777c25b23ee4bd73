"""What the host pays for a steady decode step: `python -m bench.step`, no device, no model, no HTTP.

Times schedule + submit + commit on an executor that answers at once with constant tokens, at depth 2 as the Engine
runs it. "steady": every row merely continues. "paged": prompts are staggered, so that in each step one row of
page_size needs a page. "floor": the same arithmetic as bare numpy, without any bookkeeping around it.
`--recorder`: steps of the Engine itself with nobody looking, with the page /live open, and with a trace on: what is
added.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import sys
import time
import tracemalloc
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import uvloop

from engine.clock import MonotonicClock
from engine.config import CacheOptions, EngineConfig, SchedulerOptions
from engine.engine import Engine
from engine.executor.base import StepHandle
from engine.executor.fake import FakeExecutor, FakeHandle
from engine.forward import FUTURE_TOKEN, ForwardOutput, Limits, Staging
from engine.process import MOST_OLD, MOST_YOUNG, NEW
from engine.recorder import STEPS_PER_LOOK, Tracer
from engine.request import Request, SamplingParams
from engine.scheduling.batch import Batch
from engine.scheduling.scheduler import Scheduler

PAGE_SIZE = 16
PROMPT = 16
EOS = 0
MICROSECOND = 1000
# Bytes that a line may allocate without any array (`array.any()` costs 882); int32 rows of 320 and more are above.
SMALL_OBJECTS = 1280
# What server/live_feed.py asks for: STEPS_PER_LOOK four times a second.
RECORDED_A_SECOND = 4 * STEPS_PER_LOOK
# Steps that are compared at once, and those before that are not.
TURN, UNCOUNTED = 25, 3


@dataclass
class Figures:
    """One batch size. Times in microseconds per step, medians unless said."""

    batch: int
    steady_wall: float
    steady_cpu: float
    steady_p99: float
    schedule: float
    submit: float
    commit: float
    paged_wall: float
    paged_cpu: float
    paged_p99: float
    floor: float
    ns_per_sequence: float
    # Of one steady step: lines that allocate four bytes per row at once (None where a row is too small to tell),
    # the most bytes that stood above the level before, and those that stayed.
    new_arrays: int | None
    peak_bytes: int
    kept_bytes: int
    allocating_lines: dict[str, int]


class Loop:
    """The Engine's loop at depth 2, with a batch that decodes for as long as asked."""

    def __init__(self, batch: int, steps: int, stagger: bool) -> None:
        # Warm-up (as many prefill steps as the stagger spreads prompts over), the steps, and slack.
        length = 2 * PAGE_SIZE + PROMPT + steps + 64
        limits = Limits(
            max_num_seqs=batch,
            # All prompts in one step, so that their rows reach the ends of their pages in the same step.
            max_num_batched_tokens=2 * PROMPT * batch,
            max_model_len=length,
            page_size=PAGE_SIZE,
            num_pages=(batch + 1) * -(-length // PAGE_SIZE),
            vocab_size=32_000,
        )
        self.executor = FakeExecutor(limits, compute=False)
        options = SchedulerOptions(max_num_seqs=batch, max_num_batched_tokens=limits.max_num_batched_tokens)
        cache = CacheOptions(page_size=PAGE_SIZE, num_pages=limits.num_pages)
        self.scheduler = Scheduler(limits, options, cache, self.executor.staging, MonotonicClock(), (EOS,))
        self.in_flight: deque[tuple[Batch, FakeHandle]] = deque()
        for index in range(batch):
            extra = index % PAGE_SIZE if stagger else 0
            # Prompts differ in their first token, so that nothing is shared.
            prompt = [2 + index, *range(1, PROMPT + extra)]
            self.scheduler.submit(Request(f"r{index}", prompt, SamplingParams(temperature=0.0, ignore_eos=False)))
        while self.scheduler.num_waiting or self.in_flight[-1][0].forward_input.num_decode_rows < batch:
            self.step()

    def step(self) -> tuple[int, int, int]:
        """One turn. Returns the nanoseconds of schedule, submit and commit."""
        clock = time.perf_counter_ns
        at = [clock()]
        batch = self.scheduler.schedule()
        assert batch is not None
        at.append(clock())
        self.in_flight.append((batch, self.executor.submit(batch.forward_input)))
        at.append(clock())
        if len(self.in_flight) < 2:
            return at[1] - at[0], at[2] - at[1], 0
        done, handle = self.in_flight.popleft()
        output = self.executor.resolve(handle)
        before = clock()
        self.scheduler.commit(done, output)
        return at[1] - at[0], at[2] - at[1], clock() - before


def time_steps(step: Callable[[], Any], steps: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], list[Any]]:
    """Wall and thread CPU time of each call in microseconds, and what the calls returned."""
    wall, cpu, results = np.zeros(steps), np.zeros(steps), []
    gc.collect()
    gc.disable()
    try:
        for index in range(steps):
            cpu_start, wall_start = time.thread_time_ns(), time.perf_counter_ns()
            result = step()
            wall[index] = time.perf_counter_ns() - wall_start
            cpu[index] = time.thread_time_ns() - cpu_start
            results.append(result)
    finally:
        gc.enable()
    return wall / MICROSECOND, cpu / MICROSECOND, results


def make_floor(batch: int) -> Callable[[], None]:
    """The arithmetic of a steady step in bare numpy: which rows are due, the staging rows, append, who ends."""
    limits = Limits(batch, 2 * batch, 4096, PAGE_SIZE, batch, 32_000)
    staging = Staging(limits)
    slots = np.arange(1, batch + 1, dtype=np.intp)
    computed, bound, known, limit = (np.zeros(batch + 1, np.int32) for _ in range(4))
    bound[:] = limit[:] = 2**30
    tokens = np.ones(batch, np.int32)
    context = np.zeros((batch + 1) * 64, np.int32)
    last_step = np.zeros(batch + 1, np.int64)
    stop_ids = np.full(batch + 1, EOS, np.int32)
    offsets = np.arange(batch + 1, dtype=np.int32)
    one, two = np.zeros(batch, np.int32), np.zeros(batch, np.int32)
    flag, other, index = np.zeros(batch, np.bool_), np.zeros(batch, np.bool_), np.zeros(batch, np.intp)

    def floor() -> None:
        computed.take(slots, out=one, mode="clip")
        bound.take(slots, out=two, mode="clip")
        np.greater_equal(one, two, out=flag)
        flag.any()
        staging.row_slot[:batch] = slots
        staging.row_start[:batch] = one
        staging.row_len[:batch] = 1
        staging.row_samples[:batch] = True
        staging.token_ids[:batch] = FUTURE_TOKEN
        staging.qo_indptr[: batch + 1] = offsets
        np.add(one, 1, out=one)
        computed[slots] = one
        last_step[slots] = 1
        known.take(slots, out=one, mode="clip")
        np.multiply(slots, 64, out=index)
        context[index] = tokens
        np.add(one, 1, out=one)
        known[slots] = one
        limit.take(slots, out=two, mode="clip")
        np.greater_equal(one, two, out=flag)
        stop_ids.take(slots, out=two, mode="clip")
        np.equal(two, tokens, out=other)
        np.logical_or(flag, other, out=flag)
        flag.any()

    return floor


def measure_allocations(loop: Loop, at_least: int) -> tuple[dict[str, int], int, int]:
    """Bytes by line of scheduler and cache that allocated `at_least` bytes at once, peak and kept bytes: of one step.

    numpy reports array data to tracemalloc. A line's allocation is its peak above the level before it, so an array
    that the line frees again counts as well. Steps with page crossings are avoided: it takes the least of a few.
    """
    best: dict[str, int] | None = None
    peak = kept = sys.maxsize
    tracemalloc.start()
    try:
        for _ in range(4):
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            loop.step()
            now, top = tracemalloc.get_traced_memory()
            peak, kept = min(peak, top - before), min(kept, now - before)
        for _ in range(4):
            lines = _allocating_lines(loop, at_least)
            if best is None or sum(lines.values()) < sum(best.values()):
                best = lines
    finally:
        tracemalloc.stop()
    assert best is not None
    return best, peak, kept


def _allocating_lines(loop: Loop, at_least: int) -> dict[str, int]:
    found: dict[str, int] = {}
    level = [0]
    place = [""]

    def settle() -> None:
        allocated = tracemalloc.get_traced_memory()[1] - level[0]
        if allocated >= at_least and place[0]:
            found[place[0]] = found.get(place[0], 0) + allocated

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        name = frame.f_code.co_filename
        if "/engine/scheduling/" not in name and "/engine/cache/" not in name:
            return None
        if event in ("line", "return"):
            settle()
            place[0] = f"{name[name.rindex('/engine/') + 1 :]}:{frame.f_lineno}" if event == "line" else ""
            tracemalloc.reset_peak()
            level[0] = tracemalloc.get_traced_memory()[0]
        return trace

    sys.settrace(trace)
    try:
        loop.step()
    finally:
        sys.settrace(None)
    return found


class Turns(FakeExecutor):
    """Calls `on_turn` in the wait for a step, every `left` steps that it says are left."""

    left = 1

    def __init__(self, limits: Limits, on_turn: Callable[[], int]) -> None:
        super().__init__(limits, compute=False)
        self._on_turn = on_turn

    async def wait(self, handle: StepHandle) -> ForwardOutput:
        assert isinstance(handle, FakeHandle)
        self.left -= 1
        if not self.left:
            self.left = self._on_turn()
        return self.resolve(handle)


class RecordedEngine:
    """The Engine itself over a device that answers at once, with a batch that decodes until the turns are over and
    whose streams nobody reads. A turn: TURN steps of one kind, behind some that are not counted.

    times: microseconds of the thread a step, by kind and round.
    """

    KINDS = ("off", "watched", "recorded", "traced")

    def __init__(self, batch: int, rounds: int) -> None:
        length = 2 * PROMPT + len(self.KINDS) * (TURN + UNCOUNTED) * (rounds + 1)
        pages = (batch + 1) * -(-length // PAGE_SIZE)
        limits = Limits(batch, 2 * PROMPT * batch, length, PAGE_SIZE, pages, 32_000)
        options = SchedulerOptions(max_num_seqs=batch, max_num_batched_tokens=limits.max_num_batched_tokens)
        cache = CacheOptions(page_size=PAGE_SIZE, num_pages=pages)
        self.device = Turns(limits, self._on_turn)
        self.engine = Engine(EngineConfig(scheduler=options, cache=cache), self.device, None, eos_token_ids=(EOS,))
        self.times: dict[str, list[float]] = {kind: [] for kind in self.KINDS}
        self._batch, self._rounds, self._chance = batch, rounds, random.Random(0)
        self._left: list[str] = []
        self._kind: str | None = None
        self._tracer = Tracer()
        self._began = 0
        self._over: asyncio.Event = asyncio.Event()

    async def run(self) -> None:
        """All turns."""
        running = asyncio.create_task(self.engine.run(serves=False))
        most = self.engine.limits.max_model_len - 2 * PROMPT
        sampling = SamplingParams(max_tokens=most, temperature=0.0, ignore_eos=True)
        for index in range(self._batch):
            # Prompts differ in their first token, so that nothing is shared, and in length: pages end at each step.
            prompt = [2 + index, *range(1, PROMPT + index % PAGE_SIZE)]
            self.engine.submit(Request(f"r{index}", prompt, sampling))
        # The prompts first, in one step.
        self.device.left = UNCOUNTED
        await self._over.wait()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    def _on_turn(self) -> int:
        """A turn is over, or what came before its steps are counted: how many steps it is until the next."""
        if self._kind is not None and not self._began:
            self._began = time.thread_time_ns()
            return TURN
        ended, recorder = time.thread_time_ns(), self.engine.recorder
        if self._kind is not None:
            self.times[self._kind].append((ended - self._began) / MICROSECOND / TURN)
            if self._kind == "traced":
                recorder.stop(self._tracer)
            elif self._kind != "off":
                recorder.unwatch()
        if not self._left and len(self.times["off"]) < self._rounds:
            self._left = self._chance.sample(self.KINDS, len(self.KINDS))
        if not self._left:
            self._over.set()
            return -1
        self._kind, self._began = self._left.pop(), 0
        if self._kind == "traced":
            self._tracer = Tracer()
            recorder.start(self._tracer)
        elif self._kind != "off":
            recorder.watch()
        if self._kind == "recorded":
            recorder.look(TURN + 2 * UNCOUNTED)
        return UNCOUNTED


def measure_recorder(batch: int, steps: int) -> dict[str, float]:
    """Microseconds of the thread a step of the Engine's with nobody looking ("off"), and what the page ("on") and a
    trace ("traced": every step) add, as shares: medians over rounds that have a turn of each kind, in an order of
    their own.

    The page has at most RECORDED_A_SECOND steps recorded, so "on" is put together of what a step costs that is
    recorded and one that is not while somebody looks. Of a step with a device it is a smaller share. Snapshots are no
    part of a step: bench.looking has them.
    """
    engine = RecordedEngine(batch, -(-steps // TURN))
    gc.collect()
    gc.freeze()
    thresholds = gc.get_threshold()
    # As the server has it.
    gc.set_threshold(NEW, MOST_YOUNG, MOST_OLD)
    try:
        uvloop.run(engine.run())
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
    times = engine.times
    off = float(np.median(times["off"]))
    watched, recorded, traced = (
        float(np.median(np.divide(times[kind], times["off"]))) - 1.0 for kind in ("watched", "recorded", "traced")
    )
    share = min(1.0, RECORDED_A_SECOND * off / 1e6)
    return {"off": off, "on": share * recorded + (1.0 - share) * watched, "traced": traced}


def print_recorder(batches: list[int], steps: int) -> None:
    print("a step on the host in microseconds, and what is added where /live is open, and where a trace is recorded")
    print(f"{'batch':>6}{'off':>9}{'on':>9}{'us':>9}{'traced':>9}{'us':>9}")
    for batch in batches:
        got = measure_recorder(batch, steps)
        added = "".join(f"{got[kind]:>+9.1%}{got[kind] * got['off']:>+9.2f}" for kind in ("on", "traced"))
        print(f"{batch:>6}{got['off']:>9.2f}{added}", flush=True)


def measure(batch: int, steps: int) -> Figures:
    steady = Loop(batch, steps, stagger=False)
    wall, cpu, parts = time_steps(steady.step, steps)
    schedule, submit, commit = np.median(np.array(parts), axis=0) / MICROSECOND
    lines, peak, kept = measure_allocations(steady, at_least=max(SMALL_OBJECTS, 4 * batch))
    paged = Loop(batch, steps, stagger=True)
    paged_wall, paged_cpu, _ = time_steps(paged.step, steps)
    floor_wall, _, _ = time_steps(make_floor(batch), steps)
    return Figures(
        batch=batch,
        steady_wall=float(np.median(wall)),
        steady_cpu=float(np.median(cpu)),
        steady_p99=float(np.percentile(wall, 99)),
        schedule=float(schedule),
        submit=float(submit),
        commit=float(commit),
        paged_wall=float(np.median(paged_wall)),
        paged_cpu=float(np.median(paged_cpu)),
        paged_p99=float(np.percentile(paged_wall, 99)),
        floor=float(np.median(floor_wall)),
        ns_per_sequence=float(np.median(wall)) * MICROSECOND / batch,
        new_arrays=len(lines) if 4 * batch >= SMALL_OBJECTS else None,
        peak_bytes=peak,
        kept_bytes=kept,
        allocating_lines=lines,
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.step", description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64, 256, 1024])
    parser.add_argument("--steps", type=int, default=2000, help="steps timed per figure (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--recorder", action="store_true", help="what looking costs, instead")
    arguments = parser.parse_args()
    if arguments.recorder:
        print_recorder(arguments.batch, arguments.steps)
        return
    print("microseconds per decode step (median); cpu is thread time; x is steady wall over the numpy floor")
    print(
        f"{'batch':>6}{'steady':>9}{'cpu':>8}{'p99':>8}{'paged':>9}{'cpu':>8}{'p99':>8}{'floor':>8}{'x':>6}"
        f"{'ns/seq':>9}  {'schedule':>9}{'submit':>8}{'commit':>8}  {'arrays':>7}{'peak B':>8}{'kept B':>8}"
    )
    figures = []
    for batch in arguments.batch:
        got = measure(batch, arguments.steps)
        figures.append(got)
        print(
            f"{got.batch:>6}{got.steady_wall:>9.1f}{got.steady_cpu:>8.1f}{got.steady_p99:>8.1f}"
            f"{got.paged_wall:>9.1f}{got.paged_cpu:>8.1f}{got.paged_p99:>8.1f}{got.floor:>8.1f}"
            f"{got.steady_wall / got.floor:>6.2f}{got.ns_per_sequence:>9.0f}  "
            f"{got.schedule:>9.1f}{got.submit:>8.1f}{got.commit:>8.1f}  "
            f"{'-' if got.new_arrays is None else got.new_arrays:>7}{got.peak_bytes:>8}{got.kept_bytes:>8}",
            flush=True,
        )
    largest = figures[-1]
    for line, size in sorted(largest.allocating_lines.items()):
        print(f"  a steady step at batch {largest.batch} allocates {size} bytes at {line}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(got) for got in figures], indent=1) + "\n")


if __name__ == "__main__":
    main()

"""What is kept of the service under more load than it can bear: `python -m bench.overload`.

The real engine (door, scheduler, loop) on a fake device whose steps take `--step-ms`; no HTTP, no model. A request is
good where its first token came within `--slo` seconds. Rates are of Poisson arrivals, in multiples of what the engine
finished when there was always enough to do; the first seconds of a run, in which queues fill, are not counted.

Rows: at 0.9 of capacity; at `--times` of it without admission control, and with `--ttft-slo`. The latter goes in
rounds, each beside a capacity of its own: another's work on the machine makes steps late, so that the goodput is told
by the device's steps, too. Then what a key that sends `--times` of capacity does to the p99 TTFT of another that sends
a tenth, under the policies fcfs and fair.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import random
import sys
from collections.abc import Callable

import numpy as np

from engine.config import EngineConfig, SchedulerOptions
from engine.engine import Engine
from engine.executor.fake import FakeExecutor
from engine.forward import Limits
from engine.request import FinishReason, QueueFullError, Request, SamplingParams


@dataclasses.dataclass
class Outcome:
    """TTFTs in seconds of what was answered, and how many were refused."""

    ttfts: list[float] = dataclasses.field(default_factory=list)
    finished: int = 0
    # Of the device, a second.
    steps: float = 0.0
    refused: int = 0
    broken: int = 0

    def good(self, slo: float) -> int:
        return sum(ttft <= slo for ttft in self.ttfts)


class Load:
    """Requests to one engine. arguments: of the command line."""

    def __init__(self, arguments: argparse.Namespace, *, policy: str = "fcfs", ttft_slo: float | None = None) -> None:
        self.arguments = arguments
        pages = arguments.max_num_seqs * -(-(arguments.prompt + arguments.output) // 16) * 2
        limits = Limits(arguments.max_num_seqs, arguments.budget, 4096, 16, pages, 1000)
        scheduler = SchedulerOptions(
            max_num_seqs=arguments.max_num_seqs,
            max_num_batched_tokens=arguments.budget,
            max_queued_requests=1_000_000,
            policy=policy,
            ttft_slo_s=ttft_slo,
        )
        self.device = FakeExecutor(limits, step_seconds=arguments.step_ms / 1000.0, compute=False, constant_token=7)
        self.engine = Engine(EngineConfig(scheduler=scheduler), self.device, None)
        self.outcomes: dict[str, Outcome] = {}
        self._random = random.Random(arguments.seed)
        self._count = 0

    async def ask(self, key: str, counted: Callable[[], bool] = lambda: True) -> None:
        self._count += 1
        prompt = [self._random.randrange(1, 1000) for _ in range(self.arguments.prompt)]
        # Of one length, all that are admitted at once would end at once.
        output = self._random.randint(self.arguments.output // 2, self.arguments.output * 3 // 2)
        sampling = SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True)
        outcome, counts = self.outcomes.setdefault(key, Outcome()), counted()
        try:
            stream = self.engine.submit(Request(str(self._count), prompt, sampling, fairness_key=key, namespace=key))
        except QueueFullError:
            outcome.refused += counts
            return
        async with stream:
            delta = await stream.collect()
        if not counts:
            return
        if delta.finish_reason is not FinishReason.LENGTH:
            outcome.broken += 1
        elif stream.first_token_at is not None:
            outcome.ttfts.append(stream.first_token_at - stream.arrived_at)
            outcome.finished += 1

    async def capacity(self, seconds: float) -> float:
        """Requests a second where there are always enough of them."""
        loop = asyncio.get_running_loop()
        begun = loop.time()

        async def client() -> None:
            while loop.time() - begun < seconds:
                await self.ask("all", lambda: loop.time() - begun > seconds / 4)

        async with self._running():
            loop.call_later(seconds, self._count_steps, begun)
            await asyncio.gather(*(client() for _ in range(2 * self.arguments.max_num_seqs)))
        return self.outcomes["all"].finished / (0.75 * seconds)

    def _count_steps(self, begun: float) -> None:
        rate = self.device.num_steps / (asyncio.get_running_loop().time() - begun)
        for outcome in self.outcomes.values():
            outcome.steps = rate

    async def open(self, rates: dict[str, float], seconds: float) -> dict[str, Outcome]:
        """rates: requests a second of each key."""
        loop = asyncio.get_running_loop()
        begun = loop.time()
        tasks: set[asyncio.Task[None]] = set()

        async def arrive(key: str, rate: float) -> None:
            due = begun
            while (due := due + self._random.expovariate(rate)) < begun + seconds:
                await asyncio.sleep(max(0.0, due - loop.time()))
                task = asyncio.create_task(self.ask(key, lambda: loop.time() - begun > seconds / 4))
                tasks.add(task)

        async with self._running():
            loop.call_later(seconds, self._count_steps, begun)
            await asyncio.gather(*(arrive(key, rate) for key, rate in rates.items()))
            # Who has waited for three SLOs has long missed it; the rest of a queue is not waited for.
            await asyncio.wait(tasks, timeout=3 * self.arguments.slo)
            self.engine.abort_all()
            await asyncio.gather(*tasks)
        return self.outcomes

    def _running(self) -> _Running:
        return _Running(self.engine)


class _Running:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def __aenter__(self) -> None:
        self._task = asyncio.create_task(self._engine.run())

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.wait({self._task})


async def measure(arguments: argparse.Namespace) -> dict[str, float]:
    seconds, slo, times = arguments.seconds, arguments.slo, arguments.times
    counted = 0.75 * seconds
    capacity = await Load(arguments).capacity(seconds)
    figures = {"capacity": capacity}

    async def overloaded(name: str, rate: float, admission: float | None) -> Outcome:
        outcome = (await Load(arguments, ttft_slo=admission).open({"all": rate}, seconds))["all"]
        figures[f"{name}_goodput"] = outcome.good(slo) / counted
        figures[f"{name}_p99_ttft"] = float(np.quantile(outcome.ttfts or [np.inf], 0.99))
        figures[f"{name}_refused"] = outcome.refused / counted
        return outcome

    await overloaded("calm", 0.9 * capacity, None)
    await overloaded("none", times * capacity, None)
    for number in range(arguments.rounds):
        beside = Load(arguments)
        able = await beside.capacity(seconds)
        outcome = await overloaded("kept", times * able, slo)
        figures[f"kept_share_{number}"] = share = outcome.good(slo) / counted / able
        figures[f"kept_share_by_step_{number}"] = share * beside.outcomes["all"].steps / outcome.steps
    for policy in ("fcfs", "fair"):
        alone = (await Load(arguments, policy=policy).open({"b": 0.1 * capacity, "a": 0.8 * capacity}, seconds))["b"]
        flood = (await Load(arguments, policy=policy).open({"b": 0.1 * capacity, "a": times * capacity}, seconds))["b"]
        for name, outcome in (("calm", alone), ("flood", flood)):
            figures[f"{policy}_{name}_p99"] = float(np.quantile(outcome.ttfts or [np.inf], 0.99))
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.overload", description=__doc__)
    parser.add_argument("--seconds", type=float, default=12.0, help="of each run (default: %(default)s)")
    parser.add_argument("--slo", type=float, default=1.0, help="seconds to the first token (default: %(default)s)")
    parser.add_argument("--times", type=float, default=3.0, help="load in multiples of capacity")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--output", type=int, default=64, help="tokens on average")
    parser.add_argument("--step-ms", type=float, default=10.0)
    parser.add_argument("--max-num-seqs", type=int, default=32)
    parser.add_argument("--budget", type=int, default=512, help="tokens of a step")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3, help="of capacity and overload (default: %(default)s)")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    figures = asyncio.run(measure(arguments))
    if arguments.json:
        print(json.dumps(figures))
        return 0
    calm = figures["calm_goodput"]
    print(f"capacity: {figures['capacity']:.1f} requests/s; good: first token within {arguments.slo:g} s")
    for name, told in (("calm", "0.9 x"), ("none", f"{arguments.times:g} x, queue only"),
                       ("kept", f"{arguments.times:g} x, --ttft-slo")):  # fmt: skip
        good = figures[f"{name}_goodput"]
        print(
            f"{told:20} goodput {good:6.1f}/s ({100 * good / calm:3.0f}% of 0.9 x), refused "
            f"{figures[f'{name}_refused']:6.1f}/s, p99 TTFT of the answered {figures[f'{name}_p99_ttft']:.2f} s"
        )
    for told, what in (("", "a second"), ("by_step_", "a step of the device")):
        shares = sorted(100 * figures[f"kept_share_{told}{number}"] for number in range(arguments.rounds))
        print(
            f"goodput {what} at {arguments.times:g} x with --ttft-slo, of what is finished at capacity: "
            f"{float(np.median(shares)):.0f}% ({shares[0]:.0f} to {shares[-1]:.0f} in {arguments.rounds} rounds)"
        )
    for policy in ("fcfs", "fair"):
        calm, flood = figures[f"{policy}_calm_p99"], figures[f"{policy}_flood_p99"]
        print(f"a key floods, {policy}: another's p99 TTFT {calm:.3f} s -> {flood:.3f} s ({flood / calm:.2f} x)")
    return 0


if __name__ == "__main__":
    sys.exit(main())

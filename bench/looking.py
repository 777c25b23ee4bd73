"""What looking costs a server that computes: `python -m bench.looking`, the bundled model on a CPU.

Streams decode for as long as it takes. In turns, in an order of their own: nobody looks, /live is open (its events are
read), a trace is recorded. Each turn counts the server's steps and its CPU time; shares are medians over rounds of
CPU time a step against the same round's without anybody, and so hold on a busy machine as well. `bench.step
--recorder` has the host's part of a step alone.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
from pathlib import Path

import aiohttp

from bench.server import running

KINDS = ("nobody", "live", "trace")
STEPS = "vllm:iteration_tokens_total_count"


def cpu_seconds(process: int) -> float:
    """Of all its threads until now."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Looker:
    def __init__(self, session: aiohttp.ClientSession, url: str, process: int) -> None:
        self._session, self._url, self._process = session, url, process

    async def stream(self) -> None:
        body = {"prompt": "Once", "max_tokens": 1900, "min_tokens": 1900, "ignore_eos": True, "stream": True}
        while True:
            async with self._session.post(f"{self._url}/v1/completions", json=body) as answer:
                async for _ in answer.content.iter_any():
                    pass

    async def look(self, kind: str, seconds: float) -> None:
        """Until it is cancelled, where somebody looks at all."""
        if kind == "live":
            async with self._session.get(f"{self._url}/live/events") as answer:
                async for _ in answer.content.iter_any():
                    pass
        elif kind == "trace":
            # It is still being recorded as the turn ends, and made into JSON after that: no part of it.
            async with self._session.get(f"{self._url}/trace?seconds={seconds + 0.2}") as answer:
                await answer.read()

    async def steps(self) -> int:
        async with self._session.get(f"{self._url}/metrics") as answer:
            text = await answer.text()
        return int(float(next(line for line in text.splitlines() if line.startswith(STEPS)).rpartition(" ")[2]))

    async def turn(self, kind: str, seconds: float) -> tuple[float, float]:
        """Milliseconds of a step, of the clock's and of the CPUs'."""
        looking = asyncio.create_task(self.look(kind, seconds))
        await asyncio.sleep(0.1)
        loop = asyncio.get_running_loop()
        steps, cpu, began = await self.steps(), cpu_seconds(self._process), loop.time()
        await asyncio.sleep(seconds)
        steps, cpu, took = await self.steps() - steps, cpu_seconds(self._process) - cpu, loop.time() - began
        if not steps:
            raise SystemExit(f"no step in {seconds} s: the machine is too busy, or --seconds too few")
        if kind == "trace":
            await looking
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)
        await asyncio.sleep(0.2)
        return 1e3 * took / steps, 1e3 * cpu / steps


async def measure(url: str, process: int, streams: int, rounds: int, seconds: float) -> None:
    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    chance, order = random.Random(0), list(KINDS)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(None)) as session:
        looker = Looker(session, url, process)
        tasks = [asyncio.create_task(looker.stream()) for _ in range(streams)]
        # The first steps take longer.
        warm = await looker.steps() + 100
        while await looker.steps() < warm:  # noqa: ASYNC110  (what is waited for has no event)
            await asyncio.sleep(0.2)
        for _ in range(rounds):
            chance.shuffle(order)
            for kind in order:
                found[kind].append(await looker.turn(kind, seconds))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    print(f"{streams} streams, {rounds} rounds of {seconds} s: milliseconds a step")
    print(f"{'':>8}{'clock':>9}{'':>8}{'CPU':>9}{'':>8}")
    for kind in KINDS:
        row = f"{kind:>8}"
        for place in (0, 1):
            times, others = ([one[place] for one in found[name]] for name in (kind, "nobody"))
            share = statistics.median([one / other - 1 for one, other in zip(times, others, strict=True)])
            row += f"{statistics.median(times):>9.3f}" + (f"{share:>+8.1%}" if kind != "nobody" else f"{'':>8}")
        print(row, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.looking", description=__doc__)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=2.0, help="of a turn (default: %(default)s)")
    parser.add_argument("--flags", default="--device cpu --threads 1 --log-level error", help="of the server")
    args = parser.parse_args()
    with running(args.flags) as server:
        for streams in args.streams:
            url = f"http://127.0.0.1:{server.port}"
            asyncio.run(measure(url, server.process.pid, streams, args.rounds, args.seconds))


if __name__ == "__main__":
    main()

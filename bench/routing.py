"""How well something routes between replicas: `python -m bench.routing measure --base-url http://127.0.0.1:8000`.

Replicas are the real server (door, scheduler, radix cache, HTTP) over a device that computes nothing and takes as long
as one that would: `python -m bench.routing worker --port P`. A step costs `--step-ms`, and more for each token of a
prompt and each row. Loads: chats of many groups with a prefix each, of which one replica's cache holds a part, and
conversations, each about a text of its own. How many a second is told in shares of what the replicas could do without
any cache (`--load`), so that what waits behind prompts that were not cached is what is measured; a router's own time
is told beside it.

`python -m bench.routing_ray` measures Ray Serve's replicas by it, `python -m bench.routing_smg` the router smg.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import uvloop
from aiohttp import web

from bench.datasets import Job, Prompt, Source, multi_turn_jobs, shared_prefix_jobs
from bench.figures import measure
from bench.sending import Target, arrival_times, client, drive, send
from engine.config import CacheOptions, EngineConfig, SchedulerOptions, ServerOptions
from engine.engine import Engine
from engine.executor.fake import FakeExecutor, FakeHandle
from engine.flags import DEMO_MODEL
from engine.forward import ForwardInput, Limits
from engine.metrics import EngineMetrics
from engine.models.generation import GenerationDefaults
from engine.models.registry import read_spec
from engine.text.chat_template import ChatTemplate
from engine.text.tokenizer import Tokenizer
from server.app import ServedModel, build_app
from server.serving import serve

MODEL = "routed"
PAGE_SIZE = 16
LOADS = ("shared-prefix", "multi-turn")
STEP_TOKENS = 2048
# Requests by which a router's own time is seen.
LONE = 12


class CostlyExecutor(FakeExecutor):
    """Steps take what a device would: a part of their own, one for each token of a prompt, one for each row."""

    def __init__(self, limits: Limits, costs: Costs, constant_token: int) -> None:
        super().__init__(limits, step_seconds=costs.step_ms / 1000, compute=False, constant_token=constant_token)
        self._costs = costs

    def submit(self, forward_input: ForwardInput) -> FakeHandle:
        rows = forward_input.num_rows
        prompt_tokens = int(forward_input.staging.row_len[:rows].sum()) - rows
        costs = self._costs
        self._step_seconds = (costs.step_ms + costs.token_ms * prompt_tokens + costs.row_ms * rows) / 1000
        return super().submit(forward_input)


@dataclass(frozen=True, slots=True)
class Costs:
    """Milliseconds, and what a replica has room for."""

    step_ms: float
    token_ms: float
    row_ms: float
    cache_tokens: int
    rows: int

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Costs:
        """From the flags of `add_cost_flags`."""
        given = arguments
        return cls(given.step_ms, given.token_ms, given.row_ms, given.cache_tokens, given.max_num_seqs)

    @property
    def flags(self) -> list[str]:
        """As `worker` takes them."""
        words = {"step-ms": self.step_ms, "token-ms": self.token_ms, "row-ms": self.row_ms}
        words |= {"cache-tokens": self.cache_tokens, "max-num-seqs": self.rows}
        return [f"--{name}={value}" for name, value in words.items()]

    def seconds(self, tokens: int) -> float:
        """Of a replica's time for a prompt of which nothing is cached. Decode steps are shared, and left out."""
        return (-(-tokens // STEP_TOKENS) * self.step_ms + tokens * self.token_ms) / 1000


def add_cost_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--step-ms", type=float, default=16.0, help="of a step (default: %(default)s)")
    parser.add_argument("--token-ms", type=float, default=0.25, help="of a prompt's token (default: %(default)s)")
    parser.add_argument("--row-ms", type=float, default=0.1, help="of a row (default: %(default)s)")
    parser.add_argument("--cache-tokens", type=int, default=40_960, help="of one replica's KV cache")
    parser.add_argument("--max-num-seqs", type=int, default=16, help="rows of one replica")


def add_load_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--requests", type=int, default=384, help="of each load (default: %(default)s)")
    parser.add_argument("--load", type=float, default=1.0, help="share of what the replicas could do without a cache")
    parser.add_argument("--num-prefixes", type=int, default=48)
    parser.add_argument("--prefix-len", type=int, default=1600, help="words that a group of prompts has in common")
    parser.add_argument("--turns", type=int, default=8, help="of a conversation")
    parser.add_argument("--opening-len", type=int, default=800, help="words that a conversation begins with")
    parser.add_argument("--turn-len", type=int, default=150, help="words of a turn")
    parser.add_argument("--output-len", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=LOADS)
    parser.add_argument("--rounds", type=int, default=3, help="each with all routers in turn (default: %(default)s)")


def make_worker(costs: Costs, options: ServerOptions) -> tuple[Engine, web.Application]:
    """A replica's engine and application. The tokenizer and template are the demo model's."""
    tokenizer = Tokenizer.load(DEMO_MODEL)
    limits = Limits(costs.rows, STEP_TOKENS, 16_384, PAGE_SIZE, costs.cache_tokens // PAGE_SIZE, tokenizer.vocab_size)
    config = EngineConfig(
        scheduler=SchedulerOptions(
            max_num_seqs=costs.rows, max_num_batched_tokens=STEP_TOKENS, max_queued_requests=100_000
        ),
        cache=CacheOptions(page_size=PAGE_SIZE, num_pages=limits.num_pages),
        server=options,
    )
    word = tokenizer.encode(" the", add_special_tokens=False)[0]
    metrics = EngineMetrics(MODEL, max_model_len=limits.max_model_len)
    device = CostlyExecutor(limits, costs, word)
    engine = Engine(config, device, tokenizer, eos_token_ids=tokenizer.eos_token_ids, metrics=metrics)
    model = ServedModel(
        names=(MODEL,),
        created=int(time.time()),
        chat_template=ChatTemplate.load(DEMO_MODEL),
        generation_defaults=GenerationDefaults(),
        model_config=read_spec(DEMO_MODEL),
        max_model_len=limits.max_model_len,
    )
    return engine, build_app(engine, model, options)


async def work(arguments: argparse.Namespace) -> None:
    """One replica as a server, until a signal."""
    options = ServerOptions(port=arguments.port)
    engine, app = make_worker(Costs.of(arguments), options)
    running = asyncio.create_task(engine.run())
    await serve(app, engine, options, on_listening=lambda host, port: print(f"http://{host}:{port}", flush=True))
    running.cancel()
    await asyncio.wait({running})


def make_jobs(load: str, arguments: argparse.Namespace, seed: int) -> list[Job]:
    """Chats, of words: routers read text. Every router that is measured gets the same of a seed."""
    if load == "shared-prefix":
        return shared_prefix_jobs(
            Source(),
            arguments.requests,
            prefix_len=arguments.prefix_len,
            num_prefixes=arguments.num_prefixes,
            suffix_len=64,
            output_len=arguments.output_len,
            seed=seed,
        )
    jobs = multi_turn_jobs(
        Source(),
        -(-arguments.requests // arguments.turns),
        num_turns=arguments.turns,
        input_len=arguments.turn_len,
        output_len=arguments.output_len,
        seed=seed,
    )
    rng = np.random.default_rng((seed, 1))
    return [replace(job, turns=(_opened(job.turns[0], rng, arguments), *job.turns[1:])) for job in jobs]


def _opened(turn: Prompt, rng: np.random.Generator, arguments: argparse.Namespace) -> Prompt:
    """A first turn with a text before it that is this conversation's alone."""
    return f"{Source().prompt(rng, arguments.opening_len)} {turn}"


def job_seconds(job: Job, costs: Costs, tokenizer: Tokenizer) -> float:
    """What all turns of a conversation take of a replica's time where nothing is cached."""
    history, seconds = 0, 0.0
    for turn in job.turns:
        assert isinstance(turn, str)
        history += len(tokenizer.encode(turn, add_special_tokens=False))
        seconds += costs.seconds(history)
        history += job.output_len or 0
    return seconds


async def lone_ttft_ms(target: Target) -> float:
    """Median time to the first token of short chats, one at a time: what is not the replica's."""
    times = []
    async with client() as session:
        for number in range(LONE):
            body = target.body([{"role": "user", "content": f"{number}"}], 1)
            result = await send(session, target.url, body, target.headers, 1)
            times.append(1000 * result.ttft)
    return statistics.median(times)


async def measure_load(base_url: str, load: str, arguments: argparse.Namespace, seed: int) -> dict[str, float]:
    """Figures of one load: rate, lone_ms, ttft_p50_ms, ttft_p99_ms, hit_rate, tokens_per_s, failed."""
    costs, tokenizer = Costs.of(arguments), Tokenizer.load(DEMO_MODEL)
    jobs = make_jobs(load, arguments, seed)
    target = Target(base_url, True, MODEL, ignore_eos=True, temperature=0.0)
    lone_ms = await lone_ttft_ms(target)
    seconds = statistics.fmean(job_seconds(job, costs, tokenizer) for job in jobs)
    rate = arguments.load * arguments.replicas / seconds
    arrivals = arrival_times(len(jobs), rate, 1.0, np.random.default_rng(seed))
    results, taken = await drive(target, jobs, arrivals, None, False)
    for result in results:
        if not result.success:
            print(f"a request failed: {result.error}", file=sys.stderr)
    figures = measure(results, taken, percentiles=(50.0, 99.0))
    return {
        "rate": rate * len(jobs[0].turns),
        "lone_ms": lone_ms,
        "ttft_p50_ms": figures["p50_ttft_ms"],
        "ttft_p99_ms": figures["p99_ttft_ms"],
        "hit_rate": figures["total_cached_tokens"] / max(1, figures["total_input_tokens"]),
        "tokens_per_s": figures["output_throughput"],
        "failed": figures["failed"],
    }


# A row of figures for each round.
Rounds = dict[str, list[dict[str, float]]]
# Opens a router whose replicas have nothing cached, for as long as its block lasts; gives its URL.
Opened = Callable[[], contextlib.AbstractContextManager[str]]


def in_turns(routers: Mapping[str, Opened], arguments: argparse.Namespace) -> Rounds:
    """Routers A B A B ..., so that a machine whose speed drifts is the same for all. Keys are "ROUTER, LOAD"."""
    rows: Rounds = {f"{name}, {load}": [] for load in arguments.loads for name in routers}
    for number in range(arguments.rounds):
        for name, opened in routers.items():
            for load in arguments.loads:
                # A load of its own for each: what the other one left in the caches is nobody's.
                with opened() as url:
                    row = asyncio.run(measure_load(url, load, arguments, arguments.seed + number))
                rows[f"{name}, {load}"].append(row)
                told = f"{row['ttft_p50_ms']:.0f} ms, {100 * row['hit_rate']:.0f}% cached"
                print(f"round {number + 1}: {name}, {load}: {told}", file=sys.stderr, flush=True)
    return rows


def report(rows: Rounds) -> str:
    """Medians of the rounds."""
    titles = f"{'lone':>8} {'rate':>8} {'TTFT p50':>10} {'p99':>10} {'cached':>8} {'tokens/s':>9} {'failed':>7}"
    lines = [f"{'':34} {titles}"]
    for name, rounds in rows.items():
        row = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
        lines.append(
            f"{name:34} {row['lone_ms']:5.0f} ms {row['rate']:6.1f}/s {row['ttft_p50_ms']:7.0f} ms "
            f"{row['ttft_p99_ms']:7.0f} ms {100 * row['hit_rate']:7.1f}% {row['tokens_per_s']:9.0f} "
            f"{sum(one['failed'] for one in rounds):7.0f}"
        )
    return "\n".join(lines)


def versus(rows: Rounds, plain: str, aware: str, loads: Sequence[str]) -> str:
    """How many times better, by pairs of the same round: the median, the least and the most."""
    lines = []
    for load in loads:
        pairs = list(zip(rows[f"{plain}, {load}"], rows[f"{aware}, {load}"], strict=True))
        words = []
        for key, title in (("ttft_p50_ms", "TTFT p50"), ("ttft_p99_ms", "p99")):
            ratios = [one[key] / other[key] for one, other in pairs]
            words.append(f"{title} {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        lines.append(f"{load}, {plain} / {aware}: " + ", ".join(words))
    return "\n".join(lines)


def finish(rows: Rounds, plain: str, aware: str, arguments: argparse.Namespace) -> int:
    """Print what was measured. Returns the exit code."""
    if arguments.json:
        print(json.dumps(rows))
    else:
        print(report(rows))
        print(versus(rows, plain, aware, arguments.loads))
    return int(any(row["failed"] for rounds in rows.values() for row in rounds))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.routing", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    worker = commands.add_parser("worker", help="one replica")
    worker.add_argument("--port", type=int, default=8000)
    add_cost_flags(worker)
    measured = commands.add_parser("measure", help="the loads against what is at a URL")
    measured.add_argument("--base-url", required=True)
    measured.add_argument("--name", default="router")
    measured.add_argument("--json", action="store_true")
    add_cost_flags(measured)
    add_load_flags(measured)
    arguments = parser.parse_args()
    if arguments.command == "worker":
        uvloop.run(work(arguments))
        return 0

    rows = in_turns({arguments.name: lambda: contextlib.nullcontext(arguments.base_url)}, arguments)
    print(json.dumps(rows) if arguments.json else report(rows))
    return int(any(row["failed"] for rounds in rows.values() for row in rounds))


if __name__ == "__main__":
    sys.exit(main())

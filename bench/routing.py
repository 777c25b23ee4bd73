"""How well something routes between replicas: `python -m bench.routing measure --base-url http://127.0.0.1:8000`.

Replicas are the real server (door, scheduler, radix cache, HTTP) over a device that computes nothing and takes as long
as one that would: `python -m bench.routing worker --port P`. A step costs `--step-ms`, and more for each token of a
prompt and each row. Loads: prompts of many groups with a prefix each, of which one replica's cache holds a part, and
conversations. Told: time to the first token, the part of all prompts' tokens that was cached, output tokens a second.

`python -m bench.routing_ray` measures Ray Serve's replicas by it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import uvloop
from aiohttp import web

from bench.datasets import Job, Source, multi_turn_jobs, safe_ids, shared_prefix_jobs
from bench.figures import measure
from bench.sending import Target, arrival_times, drive
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
from server.app import ServedModel, build_app, serve

MODEL = "routed"
PAGE_SIZE = 16
LOADS = ("shared-prefix", "multi-turn")


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


class Costs:
    """Milliseconds, and what a replica has room for."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.step_ms: float = arguments.step_ms
        self.token_ms: float = arguments.token_ms
        self.row_ms: float = arguments.row_ms
        self.cache_tokens: int = arguments.cache_tokens
        self.rows: int = arguments.max_num_seqs


def add_cost_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--step-ms", type=float, default=8.0, help="of a step (default: %(default)s)")
    parser.add_argument("--token-ms", type=float, default=0.1, help="of a prompt's token (default: %(default)s)")
    parser.add_argument("--row-ms", type=float, default=0.05, help="of a row (default: %(default)s)")
    parser.add_argument("--cache-tokens", type=int, default=48_000, help="of one replica's KV cache")
    parser.add_argument("--max-num-seqs", type=int, default=16, help="rows of one replica")


def add_load_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--requests", type=int, default=240, help="of each load (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=5.0, help="requests a second (conversations: a turn each)")
    parser.add_argument("--num-prefixes", type=int, default=32)
    parser.add_argument("--prefix-len", type=int, default=4000, help="tokens that a group of prompts has in common")
    parser.add_argument("--turns", type=int, default=8, help="of a conversation")
    parser.add_argument("--turn-len", type=int, default=600, help="words of a turn")
    parser.add_argument("--output-len", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=LOADS)


def make_worker(costs: Costs, options: ServerOptions) -> tuple[Engine, web.Application]:
    """A replica's engine and application. The tokenizer and template are the demo model's."""
    tokenizer = Tokenizer.load(DEMO_MODEL)
    limits = Limits(costs.rows, 2048, 16_384, PAGE_SIZE, costs.cache_tokens // PAGE_SIZE, tokenizer.vocab_size)
    config = EngineConfig(
        scheduler=SchedulerOptions(max_num_seqs=costs.rows, max_num_batched_tokens=2048, max_queued_requests=100_000),
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
    engine, app = make_worker(Costs(arguments), options)
    running = asyncio.create_task(engine.run())
    await serve(app, engine, options, on_listening=lambda host, port: print(f"http://{host}:{port}", flush=True))
    running.cancel()
    await asyncio.wait({running})


def make_jobs(load: str, arguments: argparse.Namespace) -> list[Job]:
    """Prompts are the same for every router that is measured."""
    if load == "shared-prefix":
        source = Source(safe_ids(Tokenizer.load(DEMO_MODEL).vocab_size))
        return shared_prefix_jobs(
            source,
            arguments.requests,
            prefix_len=arguments.prefix_len,
            num_prefixes=arguments.num_prefixes,
            suffix_len=64,
            output_len=arguments.output_len,
            seed=arguments.seed,
        )
    return multi_turn_jobs(
        Source(),
        -(-arguments.requests // arguments.turns),
        num_turns=arguments.turns,
        input_len=arguments.turn_len,
        output_len=arguments.output_len,
        seed=arguments.seed,
    )


async def measure_load(base_url: str, load: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Figures of one load: ttft_p50_ms, ttft_p99_ms, hit_rate, tokens_per_s, failed."""
    jobs = make_jobs(load, arguments)
    target = Target(base_url, load == "multi-turn", MODEL, ignore_eos=True, temperature=0.0)
    rng = np.random.default_rng(arguments.seed)
    arrivals = arrival_times(len(jobs), arguments.rate * len(jobs) / arguments.requests, 1.0, rng)
    results, seconds = await drive(target, jobs, arrivals, None, False)
    for result in results:
        if not result.success:
            print(f"a request failed: {result.error}", file=sys.stderr)
    figures = measure(results, seconds, percentiles=(50.0, 99.0))
    return {
        "ttft_p50_ms": figures["p50_ttft_ms"],
        "ttft_p99_ms": figures["p99_ttft_ms"],
        "hit_rate": figures["total_cached_tokens"] / max(1, figures["total_input_tokens"]),
        "tokens_per_s": figures["output_throughput"],
        "failed": figures["failed"],
    }


def report(rows: Mapping[str, Mapping[str, float]]) -> str:
    """rows: "ROUTER, LOAD" to its figures."""
    lines = [f"{'':36} {'TTFT p50':>10} {'p99':>10} {'cached':>8} {'tokens/s':>9} {'failed':>7}"]
    for name, row in rows.items():
        lines.append(
            f"{name:36} {row['ttft_p50_ms']:7.0f} ms {row['ttft_p99_ms']:7.0f} ms {100 * row['hit_rate']:7.1f}% "
            f"{row['tokens_per_s']:9.0f} {row['failed']:7.0f}"
        )
    return "\n".join(lines)


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
    add_load_flags(measured)
    arguments = parser.parse_args()
    if arguments.command == "worker":
        uvloop.run(work(arguments))
        return 0

    async def all_loads() -> dict[str, Any]:
        return {load: await measure_load(arguments.base_url, load, arguments) for load in arguments.loads}

    figures = asyncio.run(all_loads())
    rows = {f"{arguments.name}, {load}": row for load, row in figures.items()}
    print(json.dumps(figures) if arguments.json else report(rows))
    return int(any(row["failed"] for row in figures.values()))


if __name__ == "__main__":
    sys.exit(main())

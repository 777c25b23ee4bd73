"""How many replicas, ranks and routers a load takes: `python -m bench.sizing` (H200s by roofline; --cpu: this CPU).

The engine's own scheduler and radix cache run in virtual time over a step's cost: weights read once, KV read by row,
products of all tokens. The highest rate of requests that a replica serves within the bounds is looked for; everything
else is arithmetic, printed with what it rests on. Nominal limits and efficiencies are assumptions (flags) until a run
on such a GPU stands in bench/results; --cpu takes the limits that are measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.shapes import SHAPES
from engine.clock import ManualClock
from engine.config import CacheOptions, SchedulerOptions
from engine.forward import ForwardInput, ForwardOutput, Limits, Staging
from engine.request import Request, SamplingParams
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import Sequence

PAGE = 16
DAY = 86_400.0
# Of one NVIDIA H200: its data sheet.
H200 = {"bandwidth": 4.8e12, "flops": 989e12, "memory": 141e9}


@dataclass(frozen=True, slots=True)
class Shape:
    """What a step's cost depends on, of a model in bfloat16. active: parameters that a token is multiplied with."""

    parameters: float
    active: float
    kv_bytes: int

    @classmethod
    def of(cls, name: str) -> Shape:
        config = SHAPES[name]

        def number(key: str, default: int = 0) -> int:
            value = config.get(key, default)
            assert isinstance(value, int)
            return value

        hidden, layers, vocab = number("hidden_size"), number("num_hidden_layers"), number("vocab_size")
        width = number("head_dim") or hidden // number("num_attention_heads")
        attention = hidden * width * 2 * (number("num_attention_heads") + number("num_key_value_heads"))
        expert = 3 * hidden * number("moe_intermediate_size", number("intermediate_size"))
        experts, chosen = number("num_experts", 1), number("num_experts_per_tok", 1)
        head = vocab * hidden
        embedding = 0 if config["tie_word_embeddings"] else head
        return cls(
            layers * (attention + experts * expert) + head + embedding,
            layers * (attention + chosen * expert) + head,
            layers * 2 * number("num_key_value_heads") * width * 2,
        )


@dataclass(frozen=True, slots=True)
class Replica:
    """Of `ranks` devices: bytes and operations a second that steps come to, seconds of every step beside them, bytes of
    memory for pages."""

    shape: Shape
    ranks: int
    bandwidth: float
    flops: float
    step_s: float
    memory: float

    def seconds(self, step: ForwardInput) -> float:
        """Of one step."""
        rows, tokens, shape = step.num_rows, step.num_tokens, self.shape
        context = int(step.staging.row_start[:rows].sum()) + tokens
        # A batch goes through more experts the larger it is, up to all.
        share = 1.0 if shape.active >= shape.parameters else 1 - (1 - shape.active / shape.parameters) ** tokens
        weights = 2 * shape.parameters * min(1.0, share) / self.bandwidth
        products = 2 * shape.active * tokens / self.flops
        return self.step_s + max(weights, products) + context * shape.kv_bytes / self.bandwidth


@dataclass(frozen=True, slots=True)
class Load:
    """Tokens of a request: a system prompt that one of `systems` is, its own prompt and its answer (means of
    exponential distributions)."""

    shared: int
    systems: int
    own: int
    answer: int

    def requests(self, rate: float, count: int, seed: int) -> list[tuple[float, Request]]:
        """With the seconds at which they come, in order."""
        draw, at, found = random.Random(seed), 0.0, []
        systems = [[draw.randrange(1000) for _ in range(self.shared)] for _ in range(self.systems)]
        for number in range(count):
            at += draw.expovariate(rate)
            own = [draw.randrange(1000) for _ in range(1 + int(draw.expovariate(1 / self.own)))]
            params = SamplingParams(max_tokens=1 + int(draw.expovariate(1 / self.answer)), ignore_eos=True)
            found.append((at, Request(str(number), draw.choice(systems) + own, params)))
        return found


@dataclass(frozen=True, slots=True)
class Figures:
    """Of a simulated replica. seconds; shares of 1."""

    ttft_p50: float
    ttft_p99: float
    tpot_p95: float
    hit_rate: float
    busy: float
    retractions: int


def simulate(replica: Replica, load: Load, rate: float, options: argparse.Namespace) -> Figures:
    """Requests in virtual time: a step is built while the one before it runs."""
    weights = 2 * replica.shape.parameters
    num_pages = int((replica.memory - weights) // (replica.shape.kv_bytes * PAGE))
    longest = load.shared + 12 * (load.own + load.answer)
    if num_pages * PAGE < 2 * longest:
        raise SystemExit(f"{replica.memory / 1e9:.0f} GB hold the weights ({weights / 1e9:.0f} GB) and too few pages")
    limits = Limits(options.max_num_seqs, options.chunk, longest, PAGE, num_pages, 1024)
    scheduling = SchedulerOptions(max_num_seqs=options.max_num_seqs, max_num_batched_tokens=options.chunk)
    clock = ManualClock()
    scheduler = Scheduler(limits, scheduling, CacheOptions(), (Staging(limits), Staging(limits)), clock)
    coming = deque(
        (at, request)
        for at, request in load.requests(rate, options.requests, options.seed)
        if len(request.prompt_token_ids) + (request.sampling.max_tokens or 0) < longest
    )
    # The first third fills the replica, and is not looked at.
    begins = len(coming) // 3
    first: dict[Sequence, float] = {}
    fresh: list[Sequence] = []
    ttft: list[float] = []
    tpot: list[float] = []
    in_flight: deque[tuple[object, ForwardOutput, float]] = deque()
    free_at = busy = 0.0

    def advance(to: float) -> None:
        clock.advance(max(0.0, to - clock.now()))

    while coming or scheduler.has_work:
        while coming and coming[0][0] <= clock.now():
            at, request = coming.popleft()
            sequence = scheduler.submit(request)
            sequence.arrived_at = at
            fresh.append(sequence)
        batch = scheduler.schedule()
        if batch is not None:
            step, cost = batch.forward_input, replica.seconds(batch.forward_input)
            free_at = max(free_at, clock.now()) + cost
            busy += cost
            tokens = np.where(step.staging.row_samples[: step.num_rows], 7, -1).astype(np.int32)
            in_flight.append((batch, ForwardOutput(tokens, step.step), free_at))
        if len(in_flight) == 2 or (batch is None and in_flight):
            done, output, ends_at = in_flight.popleft()
            advance(ends_at)
            result = scheduler.commit(done, output)  # type: ignore[arg-type]
            for sequence in [each for each in fresh if each.num_tokens > each.num_prompt_tokens]:
                fresh.remove(sequence)
                first[sequence] = clock.now()
                if sequence.order >= begins:
                    ttft.append(clock.now() - sequence.arrived_at)
            for sequence in result.finished:
                made = sequence.num_tokens - sequence.num_prompt_tokens
                if made > 1 and sequence.order >= begins:
                    tpot.append((clock.now() - first[sequence]) / (made - 1))
                del first[sequence]
        elif not in_flight and coming:
            advance(coming[0][0])
    counters = scheduler.counters
    hits = counters.prefix_cache_hits / max(1, counters.prefix_cache_queries)
    quantile = statistics.quantiles(ttft, n=100)
    return Figures(
        statistics.median(ttft),
        quantile[98],
        statistics.quantiles(tpot, n=20)[18],
        hits,
        busy / clock.now(),
        counters.num_preemptions,
    )


def capacity(replica: Replica, load: Load, options: argparse.Namespace) -> tuple[float, Figures]:
    """The highest rate within the bounds, by bisection to 3%, and what it looks like."""

    def good(found: Figures) -> bool:
        return bool(found.ttft_p99 <= options.ttft and found.tpot_p95 <= options.tpot)

    # What the products alone would allow, with every shared token cached.
    most = replica.flops / (2 * replica.shape.active * (load.own + load.answer))
    low, high, best = 0.0, most / 8, None
    while not good(found := simulate(replica, load, high, options)) and high > 1e-3:
        high /= 2
    while high < most and good(found):
        low, best = high, found
        high *= 2
        found = simulate(replica, load, high, options)
    if best is None:
        raise SystemExit(
            f"a replica of {replica.ranks} is too slow for these bounds: at {high:g} requests a second TTFT p99 is "
            f"{found.ttft_p99:.2f} s and TPOT p95 {1000 * found.tpot_p95:.0f} ms"
        )
    while high - low > 0.03 * low:
        middle = (low + high) / 2
        if good(found := simulate(replica, load, middle, options)):
            low, best = middle, found
        else:
            high = middle
    return low, best


def sizes(
    rate: float, of_replica: float, replica: Replica, load: Load, hit_rate: float, options: argparse.Namespace
) -> dict[str, float]:
    """What a rate of requests takes, at the peak."""
    prompt = load.shared + load.own
    replicas = math.ceil(rate / (of_replica * options.headroom) - 1e-6)
    return {
        "requests/s at the peak": rate,
        "answer tokens/s": rate * load.answer,
        "replicas": replicas,
        "devices": replicas * replica.ranks,
        "router cores": math.ceil(rate / options.router_rate),
        "KV moved, prefill and decode apart, GB/s": rate * prompt * (1 - hit_rate) * replica.shape.kv_bytes / 1e9,
        "KV written to disk, GB/s": rate * load.own * replica.shape.kv_bytes / 1e9,
    }


def this_machine(shape: Shape, threads: int) -> Replica:
    """By limits that are measured now."""
    import psutil  # type: ignore[import-untyped]
    import torch

    from bench.cpu import gemm_rate, read_bandwidth

    memory = 0.5 * psutil.virtual_memory().available
    return Replica(shape, 1, read_bandwidth(threads), gemm_rate(torch.float32, threads), 0.001, memory)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.sizing", description=__doc__)
    parser.add_argument("--shape", choices=[name for name in SHAPES if name != "qwen3.5-0.8b"], default="llama-3.1-8b")
    parser.add_argument("--ranks", type=int, default=1, help="devices of a replica")
    parser.add_argument("--cpu", type=int, metavar="THREADS", help="a replica is this machine, by limits measured now")
    parser.add_argument("--memory-share", type=float, default=0.75, help="of the nominal bandwidth (assumed)")
    parser.add_argument("--flops-share", type=float, default=0.55, help="of the nominal operations (assumed)")
    parser.add_argument("--step-us", type=float, default=400.0, help="of a step beside reading and products (assumed)")
    parser.add_argument("--shared", type=int, default=600, help="tokens of a system prompt")
    parser.add_argument("--systems", type=int, default=20)
    parser.add_argument("--own", type=int, default=900, help="mean tokens of a request's own prompt")
    parser.add_argument("--answer", type=int, default=250, help="mean tokens of an answer")
    parser.add_argument("--ttft", type=float, default=1.0, help="seconds, p99")
    parser.add_argument("--tpot", type=float, default=0.05, help="seconds, p95")
    parser.add_argument("--requests", type=int, default=1500, help="that are simulated at each rate")
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--per-day", type=float, default=1e6)
    parser.add_argument("--peak", type=float, default=3.0, help="of the mean rate (assumed)")
    parser.add_argument("--headroom", type=float, default=0.7, help="of a replica's capacity that is planned with")
    parser.add_argument("--gpus", type=int, default=1000)
    parser.add_argument("--router-rate", type=float, default=500.0, help="requests/s of a router's core (assumed)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    shape, load = Shape.of(args.shape), Load(args.shared, args.systems, args.own, args.answer)
    if args.cpu:
        replica, source = this_machine(shape, args.cpu), f"this machine with {args.cpu} threads, measured now"
    else:
        replica = Replica(
            shape,
            args.ranks,
            args.ranks * H200["bandwidth"] * args.memory_share,
            args.ranks * H200["flops"] * args.flops_share,
            args.step_us * 1e-6,
            0.9 * args.ranks * H200["memory"],
        )
        source = f"{args.ranks} H200 by its data sheet, times {args.memory_share:g} and {args.flops_share:g}"
    print(f"{args.shape}: {shape.parameters / 1e9:.2f}G parameters, {shape.kv_bytes / 1024:.0f} KiB of KV a token")
    print(f"a replica: {source}: {replica.bandwidth / 1e9:,.0f} GB/s, {replica.flops / 1e12:,.2f} Tflop/s")
    print(f"a request: {args.shared} shared tokens (of {args.systems} systems), {args.own} own, {args.answer} answered")
    rate, figures = capacity(replica, load, args)
    print(
        f"a replica serves {rate:.2f} requests/s with TTFT p99 <= {args.ttft:g} s, TPOT p95 <= "
        f"{1000 * args.tpot:g} ms: TTFT p50 {1000 * figures.ttft_p50:.0f} ms, p99 {1000 * figures.ttft_p99:.0f}, "
        f"TPOT p95 {1000 * figures.tpot_p95:.1f} ms, {figures.hit_rate:.0%} of prompt tokens cached, device busy "
        f"{figures.busy:.0%}, {figures.retractions} retractions (simulated)"
    )
    day = sizes(args.per_day / DAY * args.peak, rate, replica, load, figures.hit_rate, args)
    fleet_rate = args.gpus // replica.ranks * rate * args.headroom
    fleet = sizes(fleet_rate, rate, replica, load, figures.hit_rate, args)
    print(f"{'':46}{args.per_day:,.0f} a day, peak x{args.peak:g}{args.gpus:>18,} devices")
    for name, value in day.items():
        print(f"{name:46}{value:>24,.2f}{fleet[name]:>24,.2f}")
    millions = fleet_rate / args.peak * DAY / 1e6
    print(f"{args.gpus:,} devices serve {millions:,.0f} million requests a day with that peak")
    if args.json:
        args.json.write_text(json.dumps({"command": sys.argv, "rate": rate, "day": day, "fleet": fleet}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""KV memory of models whose layers see different windows, with memory groups and without: `python -m bench.groups`.

The scheduler and the cache at work on a device that computes nothing: prompts of random tokens go through in chunks,
answers are decoded behind them. Memory is in pages of one layer, so that the two ways compare, and counts what nobody
else can have.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.clock import ManualClock
from engine.config import CacheOptions, SchedulerOptions
from engine.executor.fake import FakeExecutor
from engine.forward import Limits
from engine.groups import MemoryGroup, num_buffers, one_group, plan_groups
from engine.request import Request, SamplingParams
from engine.scheduling.scheduler import Scheduler

PAGE_SIZE = 16
VOCAB = 150_000

# Windows of every layer.
SHAPES: dict[str, list[int | None]] = {
    "gemma-3-1b": [None if layer % 6 == 5 else 512 for layer in range(26)],
    "gemma-3-4b": [None if layer % 6 == 5 else 1024 for layer in range(34)],
    "gemma-3-12b": [None if layer % 6 == 5 else 1024 for layer in range(48)],
    "gemma-3-27b": [None if layer % 6 == 5 else 1024 for layer in range(62)],
    "gemma-2-9b": [4096 if layer % 2 == 0 else None for layer in range(42)],
    "gpt-oss-20b": [128 if layer % 2 == 0 else None for layer in range(24)],
}


@dataclass
class Held:
    """Pages of one layer that one sequence holds at most while prompts are computed, and while it decodes."""

    prefill: float
    decode: float


def measure(
    groups: tuple[MemoryGroup, ...], num_layers: int, tokens: int, answer: int, budget: int, count: int
) -> Held:
    """Of `count` sequences at once that reach `tokens` tokens each, `answer` of them decoded."""
    pages = count * len(groups) * (tokens // PAGE_SIZE + 1)
    limits = Limits(count, budget, tokens + 1, PAGE_SIZE, pages, VOCAB, groups)
    executor = FakeExecutor(limits, compute=False)
    scheduler = Scheduler(
        limits,
        SchedulerOptions(max_num_seqs=count, max_num_batched_tokens=budget),
        CacheOptions(page_size=PAGE_SIZE, num_pages=pages),
        executor.staging,
        ManualClock(),
    )
    rng = np.random.default_rng(0)
    for index in range(count):
        prompt = rng.integers(0, VOCAB, tokens - answer).tolist()
        scheduler.submit(Request(f"r{index}", prompt, SamplingParams(max_tokens=answer, ignore_eos=True)))
    held = Held(0, 0)
    buffers = num_buffers(groups, num_layers)
    while scheduler.has_work:
        batch = scheduler.schedule()
        assert batch is not None
        used = (pages - scheduler.kv_cache.num_available) * buffers / count
        if batch.forward_input.num_decode_rows == count:
            held.decode = max(held.decode, used)
        else:
            held.prefill = max(held.prefill, used)
        scheduler.commit(batch, executor.resolve(executor.submit(batch.forward_input)))
    assert scheduler.counters.num_preemptions == 0
    return held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--tokens", type=int, default=32_768, help="of one sequence, prompt and answer")
    parser.add_argument("--answer", type=int, default=1_024, help="tokens of those that are decoded")
    parser.add_argument("--budget", type=int, default=2_048, help="tokens of a step, so of a chunk of a prompt")
    parser.add_argument("--sequences", type=int, default=4, help="at once")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    print(f"pages of one layer that one of {args.sequences} sequences of {args.tokens:,} tokens holds at most")
    print(f"{'shape':<14}{'groups':>8}{'one group':>12}{'prompts':>10}{'share':>8}{'answers':>10}{'share':>8}")
    figures: dict[str, dict[str, float]] = {}
    for name in args.shapes:
        windows = SHAPES[name]
        sizes = len(windows), args.tokens, args.answer, args.budget, args.sequences
        groups = plan_groups(windows, args.tokens)
        one, several = measure(one_group(windows), *sizes), measure(groups, *sizes)
        whole = max(one.prefill, one.decode)
        figures[name] = {
            "groups": len(groups),
            "one_group": whole,
            "prompts": several.prefill,
            "answers": several.decode,
            "share": max(several.prefill, several.decode) / whole,
        }
        print(
            f"{name:<14}{len(groups):>8}{whole:>12,.0f}{several.prefill:>10,.0f}{several.prefill / whole:>8.1%}"
            f"{several.decode:>10,.0f}{several.decode / whole:>8.1%}",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()

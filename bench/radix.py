"""Cost of the radix KV cache against its size and the prompt's length: `python -m bench.radix`.

Thread CPU time of this process, medians; no device, no scheduler. Pages are evicted one per call, as decode under
pressure asks for them: in the order in which they were entered, and in one that is random in memory.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from engine.cache.eviction.registry import EVICTION_POLICIES
from engine.cache.kv_cache import KVCache
from engine.forward import Int32Array

PAGE_SIZE = 16
VOCAB = 150_000


def _prompt(rng: np.random.Generator, num_tokens: int) -> Int32Array:
    return rng.integers(0, VOCAB, num_tokens, dtype=np.int32)


def _store(cache: KVCache, tokens: Int32Array, chunk: int) -> None:
    """Enter a prompt in chunks, each of which becomes a node, and leave it unlocked."""
    seq = cache.begin(tokens)
    for end in range(chunk, len(tokens) + chunk, chunk):
        end = min(end, len(tokens))
        if not cache.reserve(seq, end):
            raise RuntimeError("the cache is too small for this benchmark")
        cache.enter(seq, tokens, end)
    cache.release(seq, tokens, 0)


def _microseconds(call: Callable[[], Any], repeat: int, after: Callable[[Any], None]) -> float:
    """Median of `repeat` calls; `after` takes the result and is not timed."""
    times = []
    for _ in range(repeat):
        start = time.thread_time_ns()
        result = call()
        times.append(time.thread_time_ns() - start)
        after(result)
    return statistics.median(times) / 1000


def bench_evict(num_pages: int, run_pages: int, policy: str, order: str) -> float:
    """Microseconds per page that a full cache of num_pages evicts to hand it out, one page per call."""
    rng = np.random.default_rng(0)
    cache = KVCache(num_pages, PAGE_SIZE, eviction_policy=policy)
    run = run_pages * PAGE_SIZE
    # One token more than the pages, so that begin() matches all of them when the prompt is touched.
    prompts = rng.integers(0, VOCAB, (num_pages // run_pages, run + 1), dtype=np.int32)
    for prompt in prompts:
        _store(cache, prompt[:run], run)
    for i in rng.permutation(len(prompts)) if order == "random" else range(len(prompts)):
        cache.release(cache.begin(prompts[i]), prompts[i], 0)
    holder = cache.begin([0])
    cache.reserve(holder, cache.num_free * PAGE_SIZE)
    before, batch = cache.num_evicted_pages, 50
    repeat = max(1, min(cache.num_available // 2, 20_000) // batch)

    def evict_batch() -> None:
        for _ in range(batch):
            cache.reserve_one(holder)

    result = _microseconds(evict_batch, repeat, lambda _: None) / batch
    if cache.num_evicted_pages - before != repeat * batch:
        raise RuntimeError("not every page was evicted")
    return result


def bench_prompt(num_tokens: int, chunk: int, repeat: int) -> dict[str, float]:
    """Microseconds to match a warm prompt, to give it back, and to enter a new one."""
    rng = np.random.default_rng(0)
    cache = KVCache(4 * num_tokens // PAGE_SIZE + 1_000, PAGE_SIZE)
    for _ in range(2):
        _store(cache, warm := _prompt(rng, num_tokens), chunk)
    as_list = warm.tolist()
    seqs: list[Any] = []
    result = {
        "match": _microseconds(lambda: cache.begin(warm), repeat, lambda seq: cache.release(seq, warm, 0)),
        "match_list": _microseconds(lambda: cache.begin(as_list), repeat, lambda seq: cache.release(seq, as_list, 0)),
        "match_length": _microseconds(lambda: cache.match_length(warm), repeat, lambda _: None),
    }

    def begin() -> None:
        seqs.append(cache.begin(warm))

    begin()
    result["release"] = _microseconds(lambda: cache.release(seqs.pop(), warm, 0), repeat, lambda _: begin())
    cache.release(seqs.pop(), warm, 0)

    fresh: list[Int32Array] = []
    reserve, enter = [], []
    for _ in range(repeat):
        cache.flush()
        fresh[:] = [_prompt(rng, num_tokens)]
        seq = cache.begin(fresh[0])
        start = time.thread_time_ns()
        cache.reserve(seq, num_tokens)
        middle = time.thread_time_ns()
        cache.enter(seq, fresh[0], num_tokens)
        reserve.append(middle - start)
        enter.append(time.thread_time_ns() - middle)
        cache.release(seq, fresh[0], 0)
    return result | {"reserve": statistics.median(reserve) / 1000, "insert": statistics.median(enter) / 1000}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pages", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--runs", type=int, nargs="+", default=[1, 32], help="pages per node for eviction")
    parser.add_argument("--policies", nargs="+", default=["lru"], choices=sorted(EVICTION_POLICIES))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--chunk", type=int, default=512, help="tokens per node for match")
    parser.add_argument("--repeat", type=int, default=51)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()

    evict: dict[str, dict[str, float]] = {}
    print("us per evicted page, by pages in the cache")
    print(f"{'policy, run, order':<24}" + "".join(f"{n:>11,}" for n in args.pages) + "   last/first")
    for policy, run, order in itertools.product(args.policies, args.runs, ("entered", "random")):
        row: dict[str, float] = {}
        for num_pages in args.pages:
            # A small cache is over in a few batches, so it is filled several times.
            times = [bench_evict(num_pages, run, policy, order) for _ in range(max(1, 20_000 // num_pages))]
            row[str(num_pages)] = statistics.median(times)
            gc.collect()
        name = f"{policy}, {run}, {order}"
        evict[name] = row
        values = list(row.values())
        cells = "".join(f"{value:>11.2f}" for value in values)
        print(f"{name:<24}{cells}{values[-1] / values[0]:>13.2f}", flush=True)

    prompts = {str(n): bench_prompt(n, args.chunk, args.repeat) for n in args.tokens}
    print(f"\nus per prompt, {args.chunk}-token nodes, by tokens of the prompt")
    print(f"{'':<24}" + "".join(f"{n:>11,}" for n in args.tokens))
    for name in next(iter(prompts.values())):
        print(f"{name:<24}" + "".join(f"{figures[name]:>11.1f}" for figures in prompts.values()))
    if args.json:
        args.json.write_text(json.dumps({"evict_us": evict, "prompt_us": prompts}, indent=1) + "\n")


if __name__ == "__main__":
    main()

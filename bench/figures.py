"""The figures of a benchmark's results, and `vllm bench serve`'s table of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bench.sending import BenchError, Result

WIDTH = 50
TITLES = {
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
    "e2el": ("E2EL", "End-to-end Latency"),
}


def parse_goodput(items: Sequence[str]) -> dict[str, float]:
    """["ttft:200", "tpot:50"] to limits in milliseconds."""
    limits: dict[str, float] = {}
    for item in items:
        name, _, value = item.partition(":")
        try:
            limits[name] = float(value)
        except ValueError:
            raise BenchError(f"--goodput: {item!r} is not NAME:MILLISECONDS") from None
        if name not in ("ttft", "tpot", "e2el") or limits[name] < 0:
            raise BenchError(f"--goodput: {item!r}: the name must be ttft, tpot or e2el and the time 0 or more")
    return limits


def percentile_name(percentile: float) -> str:
    """99.0 -> p99, 99.9 -> p99.9"""
    return f"p{percentile:g}"


def measure(
    results: Sequence[Result],
    duration: float,
    *,
    percentiles: Sequence[float] = (99.0,),
    goodput: dict[str, float] | None = None,
) -> dict[str, Any]:
    """The numbers of a run, under `vllm bench serve`'s JSON keys; latencies in ms.

    TPOT of a request is (E2EL - TTFT) / (output tokens - 1); requests with one token have none. The peak is of whole
    seconds; a chunk stands for its share of its request's tokens.
    """
    good = [result for result in results if result.success]
    total_input = sum(result.prompt_len for result in good)
    total_output = sum(result.output_len for result in good)
    tpots = [_tpot(result) for result in good if result.output_len > 1]
    series = {
        "ttft": [result.ttft for result in good],
        "tpot": tpots,
        "itl": [gap for result in good for gap in result.itl],
        "e2el": [result.latency for result in good],
    }
    peak_tokens, peak_requests = _peaks(good)
    metrics: dict[str, Any] = {
        "duration": duration,
        "completed": len(good),
        "failed": len(results) - len(good),
        "total_input_tokens": total_input,
        "total_output_tokens": total_output,
        "request_throughput": len(good) / duration,
        "request_goodput": _num_good(good, goodput) / duration if goodput else None,
        "output_throughput": total_output / duration,
        "total_token_throughput": (total_input + total_output) / duration,
        "max_output_tokens_per_s": peak_tokens,
        "max_concurrent_requests": peak_requests,
        "total_cached_tokens": sum(result.cached_tokens for result in good),
        "num_requests_with_cached_tokens": sum(result.cached_tokens > 0 for result in good),
    }
    for name, values in series.items():
        milliseconds = np.array(values or [0.0]) * 1000
        metrics[f"mean_{name}_ms"] = float(milliseconds.mean())
        metrics[f"median_{name}_ms"] = float(np.median(milliseconds))
        metrics[f"std_{name}_ms"] = float(milliseconds.std())
        for percentile in percentiles:
            metrics[f"{percentile_name(percentile)}_{name}_ms"] = float(np.percentile(milliseconds, percentile))
    return metrics


def _tpot(result: Result) -> float:
    return (result.latency - result.ttft) / (result.output_len - 1) if result.output_len > 1 else 0.0


def _num_good(results: Sequence[Result], limits: dict[str, float]) -> int:
    """Requests that keep every limit."""
    count = 0
    for result in results:
        found = {"ttft": result.ttft, "tpot": _tpot(result), "e2el": result.latency}
        count += all(found[name] * 1000 <= limit for name, limit in limits.items())
    return count


def _peaks(results: Sequence[Result]) -> tuple[float, int]:
    """Most output tokens and most requests alive in any second since the first request was sent."""
    if not results:
        return 0.0, 0
    origin = min(result.start_time for result in results)
    seconds = int(max(result.start_time + result.latency for result in results) - origin) + 1
    tokens = np.zeros(seconds)
    alive = np.zeros(seconds, dtype=np.int64)
    for result in results:
        start = result.start_time - origin
        times = start + result.ttft + np.concatenate(([0.0], np.cumsum(result.itl)))
        places = np.minimum(times.astype(np.int64), seconds - 1)
        np.add.at(tokens, places, result.output_len / len(times))
        alive[int(start) : int(start + result.latency) + 1] += 1
    return float(tokens.max()), int(alive.max())


def table(
    metrics: dict[str, Any],
    *,
    shown: Sequence[str] = ("ttft", "tpot", "itl", "e2el"),
    percentiles: Sequence[float] = (99.0,),
    max_concurrency: int | None = None,
    request_rate: float = float("inf"),
) -> str:
    """The table of `vllm bench serve`, line by line, then two lines on the prefix cache."""
    lines = [f"{' Serving Benchmark Result ':=^{WIDTH}}"]

    def count(title: str, value: int) -> None:
        lines.append(f"{title:<40} {value:<10}")

    def number(title: str, value: float) -> None:
        lines.append(f"{title:<40} {value:<10.2f}")

    count("Successful requests:", metrics["completed"])
    count("Failed requests:", metrics["failed"])
    if max_concurrency is not None:
        count("Maximum request concurrency:", max_concurrency)
    if np.isfinite(request_rate):
        number("Request rate configured (RPS):", request_rate)
    number("Benchmark duration (s):", metrics["duration"])
    count("Total input tokens:", metrics["total_input_tokens"])
    count("Total generated tokens:", metrics["total_output_tokens"])
    number("Request throughput (req/s):", metrics["request_throughput"])
    if metrics["request_goodput"] is not None:
        number("Request goodput (req/s):", metrics["request_goodput"])
    number("Output token throughput (tok/s):", metrics["output_throughput"])
    number("Peak output token throughput (tok/s):", metrics["max_output_tokens_per_s"])
    number("Peak concurrent requests:", metrics["max_concurrent_requests"])
    number("Total token throughput (tok/s):", metrics["total_token_throughput"])
    for name in shown:
        short, title = TITLES[name]
        lines.append(f"{title:-^{WIDTH}}")
        number(f"Mean {short} (ms):", metrics[f"mean_{name}_ms"])
        number(f"Median {short} (ms):", metrics[f"median_{name}_ms"])
        for percentile in percentiles:
            key = percentile_name(percentile)
            number(f"{key.upper()} {short} (ms):", metrics[f"{key}_{name}_ms"])
    lines.append("=" * WIDTH)
    count("Total cached prompt tokens:", metrics["total_cached_tokens"])
    count("Requests with cached tokens:", metrics["num_requests_with_cached_tokens"])
    return "\n".join(lines)

"""EngineMetrics: counters, gauges and histograms under the names that dashboards and gateways already read.

The engine and the server write on the loop thread, with plain additions; families are built when `/metrics` asks.
One naming scheme costs nothing while nobody scrapes, and no registry is global.
"""

from __future__ import annotations

import re
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from prometheus_client import CollectorRegistry, GCCollector, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from engine.config import StartupError
from engine.request import FinishReason

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Bucket bounds are part of the names' contract: dashboards compute quantiles and heat maps from them.
VLLM_TTFT = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip
VLLM_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
VLLM_REQUEST = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
VLLM_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
VLLM_N = (1, 2, 5, 10, 20)
SGLANG_TTFT = (0.1, 0.2, 0.4, 0.6, 0.8, 1, 2, 4, 6, 8, 10, 20, 40, 60, 80, 100, 200, 400)
SGLANG_TOKEN = (
    0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.025, 0.03, 0.035, 0.04, 0.06, 0.08, 0.1, 0.2, 0.4, 0.6, 0.8,
    1, 2, 4, 6, 8,
)  # fmt: skip
SGLANG_REQUEST = (*SGLANG_TTFT, 600, 1200, 1800, 2400)
SGLANG_QUEUE = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
LOOP_LAG = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
HTTP_DURATION = (0.01, 0.1, 0.5, 1, 5, 10, 60, 300)

# Handlers are route patterns, so they are few; a bug in that must not fill the memory.
MAX_HTTP_SERIES = 512
# Rates between scrapes need a span to be meaningful.
MIN_RATE_SECONDS = 1.0


def one_two_five(limit: int) -> tuple[int, ...]:
    """1, 2, 5, 10, ... up to limit."""
    bounds: list[int] = []
    power = 1
    while power <= limit:
        bounds += [digit * power for digit in (1, 2, 5) if digit * power <= limit]
        power *= 10
    return tuple(bounds)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """How the engine stands at this moment.

    num_evictable_pages: used by nobody but the radix tree. num_total_tokens: that the whole cache can hold.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_used_pages: int = 0
    num_total_pages: int = 0
    page_size: int = 1
    num_evictable_pages: int = 0
    num_total_tokens: int = 0

    def tokens_of(self, num_pages: int) -> int:
        """Tokens that so many pages can hold: with several memory groups fewer than page_size each."""
        return num_pages * self.num_total_tokens // self.num_total_pages if self.num_total_pages else 0

    @property
    def num_used_tokens(self) -> int:
        """Tokens that the pages in use can hold."""
        return self.tokens_of(self.num_used_pages)

    @property
    def kv_usage(self) -> float:
        """0..1"""
        return self.num_used_pages / self.num_total_pages if self.num_total_pages else 0.0


class Histogram:
    """Counts per bucket for each of `rows` label values; a value on a bound belongs below it, as Prometheus says."""

    __slots__ = ("_bounds", "bounds", "counts", "sums")

    def __init__(self, bounds: Sequence[float], rows: int = 1) -> None:
        self._bounds = list(bounds)
        self.bounds: npt.NDArray[np.float64] = np.asarray(bounds, dtype=np.float64)
        self.counts: npt.NDArray[np.int64] = np.zeros((rows, len(bounds) + 1), dtype=np.int64)
        self.sums: npt.NDArray[np.float64] = np.zeros(rows, dtype=np.float64)

    def observe(self, value: float, row: int = 0) -> None:
        """One value."""
        # bisect is five times as fast as searchsorted on one value; a bool would index numpy as a mask.
        self.counts[int(row), bisect_left(self._bounds, value)] += 1
        self.sums[int(row)] += value

    def observe_many(self, values: npt.NDArray[np.float64], row: int = 0) -> None:
        """A whole step's values: about 10 us for 256."""
        if len(values):
            places = self.bounds.searchsorted(values)
            self.counts[row] += np.bincount(places, minlength=len(self.bounds) + 1)
            self.sums[row] += values.sum()

    def buckets(self, row: int | None = None) -> tuple[list[tuple[str, float]], float]:
        """Cumulative (le, count) pairs and the sum, of one row or of all together."""
        counts = self.counts.sum(axis=0) if row is None else self.counts[row]
        total = float(self.sums.sum() if row is None else self.sums[row])
        names = [*map(floatToGoString, self.bounds.tolist()), "+Inf"]
        return list(zip(names, np.cumsum(counts).tolist(), strict=True)), total


# Rows of the histograms that SGLang splits by is_streaming.
_STREAMING = ("false", "true")


class DraftTotals(Protocol):
    """Of speculative decoding since the start, as engine/speculation/rows.py counts them."""

    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int

    @property
    def accepted_by_position(self) -> Iterable[int]: ...


class EngineMetrics(Collector):
    """What the engine counts, and how it is called.

    Written as plain attributes: prompt_tokens (when a prefill is scheduled), generation_tokens, prefix_cache_queries
    and prefix_cache_hits (both in tokens), num_preemptions, num_steps, evicted_pages; loop_utilisation (0..1).
    prefix: vllm, sglang, both, or a word of one's own for vLLM's families under it. now: seconds, for rates.
    """

    def __init__(
        self,
        model_name: str,
        *,
        prefix: str = "vllm",
        max_model_len: int = 32768,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        names = ["vllm", "sglang"] if prefix == "both" else [prefix]
        if not all(re.fullmatch(r"[a-zA-Z_][a-zA-Z0-9_]*", name) for name in names):
            raise StartupError(f"--metrics-prefix: {prefix!r} is no metric name (letters, digits and _ only)")
        self.prefixes = names
        self.model_name = model_name
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.prefix_cache_queries = 0
        self.prefix_cache_hits = 0
        self.num_preemptions = 0
        self.num_steps = 0
        # Of speculative decoding; None where nothing speculates. By position: how many drafts there were right.
        self.drafts: DraftTotals | None = None
        self.evicted_pages = 0

        self.finished = dict.fromkeys(FinishReason, 0)
        self.rejected: dict[str, int] = {}
        # Requests that ended by an error, by the part that failed; steps that did and were tried again.
        self.failures: dict[str, int] = {}
        self.failed_steps = 0
        self.kv_violations = 0
        self.memory_stage = self.memory_sheds = 0
        # Connections of clients that were too slow, or too many, by reason.
        self.connections_cut: Mapping[str, int] = {}
        self.startup_seconds: dict[str, float] = {}
        self.cache_config: dict[str, str] = {}
        # Of finished requests, so that the two always add up to their prompts.
        self.finished_cached_tokens = 0
        self.finished_computed_tokens = 0
        self.stats: Callable[[], EngineStats] = EngineStats

        lengths = one_two_five(max_model_len)
        self.num_prompt = Histogram(lengths)
        self.num_generation = Histogram(lengths)
        self.max_tokens = Histogram(lengths)
        self.num_computed = Histogram(lengths)
        self.step_tokens = Histogram(VLLM_STEP_TOKENS)
        self.n = Histogram(VLLM_N)
        self.prefill = Histogram(VLLM_REQUEST)
        self.decode = Histogram(VLLM_REQUEST)
        self.inference = Histogram(VLLM_REQUEST)
        self._schemes: list[_Vllm | _Sglang] = [
            _Sglang(self, model_name, now) if name == "sglang" else _Vllm(self, model_name, name) for name in names
        ]
        self._others: list[Callable[[], Iterable[Metric]]] = []
        self.loop_utilisation = 0.0
        self.loop_lag = Histogram(LOOP_LAG)
        self._http_counts: dict[tuple[str, str, str], int] = {}
        self._http_durations: dict[tuple[str, str], Histogram] = {}

        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        ProcessCollector(registry=self._registry)
        GCCollector(registry=self._registry)

    # The engine's side.

    def bind(self, stats: Callable[[], EngineStats]) -> None:
        """Where the gauges are read, once per scrape."""
        self.stats = stats

    def add_families(self, collect: Callable[[], Iterable[Metric]]) -> None:
        """What others count, read at every scrape."""
        self._others.append(collect)

    def on_first_token(self, ttft: float, queue_time: float, prefill_time: float, *, stream: bool = True) -> None:
        """Seconds: since arrival; from arrival to the first launch; from there to the first token."""
        for scheme in self._schemes:
            scheme.ttft.observe(ttft, stream)
            scheme.queue.observe(queue_time)
        self.prefill.observe(prefill_time)

    def observe_inter_token(self, values: npt.NDArray[np.float64]) -> None:
        """Seconds between a row's last two tokens, for every row of a step."""
        for scheme in self._schemes:
            scheme.inter_token.observe_many(values)

    def on_step(self, num_tokens: int) -> None:
        """A step was committed that computed this many tokens."""
        self.num_steps += 1
        self.step_tokens.observe(num_tokens)

    def on_finished(
        self,
        reason: FinishReason,
        num_prompt: int,
        num_output: int,
        num_cached: int,
        e2e: float,
        decode_time: float | None = None,
        max_tokens: int | None = None,
        n: int = 1,
        *,
        queue_time: float = 0.0,
        stream: bool = True,
    ) -> None:
        """A sequence ended. Lengths and times are kept for stop and length alone: clients that leave early and
        errors would make the latencies look good. decode_time: seconds from the first token to the last.
        """
        self.finished[reason] += 1
        self.finished_cached_tokens += num_cached
        self.finished_computed_tokens += num_prompt - num_cached
        if reason not in (FinishReason.STOP, FinishReason.LENGTH):
            return
        self.num_prompt.observe(num_prompt)
        self.num_generation.observe(num_output)
        self.num_computed.observe(num_prompt - num_cached)
        self.n.observe(n)
        if max_tokens is not None:
            self.max_tokens.observe(max_tokens)
        if decode_time is not None:
            self.decode.observe(decode_time)
        self.inference.observe(max(0.0, e2e - queue_time))
        for scheme in self._schemes:
            scheme.e2e.observe(e2e, stream)
            if decode_time is not None and num_output > 1:
                scheme.per_output_token.observe(decode_time / (num_output - 1), stream)

    def on_rejected(self, reason: str) -> None:
        """A request was refused at the door; reason is a word from a fixed set (queue_full, draining, ...)."""
        self.rejected[reason] = self.rejected.get(reason, 0) + 1

    def set_startup_seconds(self, phase: str, seconds: float) -> None:
        """How long a phase of the start took (load_weights, capture, ...)."""
        self.startup_seconds[phase] = seconds

    def set_cache_config(self, *, block_size: int, num_gpu_blocks: int, **labels: object) -> None:
        """Labels of cache_config_info; gateways read these two by these names."""
        values = {"block_size": block_size, "num_gpu_blocks": num_gpu_blocks, **labels}
        self.cache_config = {name: str(value) for name, value in values.items()}

    def on_failure(self, domain: str) -> None:
        """A request ended by an error of its own; domain: a word from a fixed set (forward, text, grammar, ...)."""
        self.failures[domain] = self.failures.get(domain, 0) + 1

    # The server's side.

    def observe_http(self, handler: str, method: str, status: int, seconds: float) -> None:
        """A response is complete. handler: the route's pattern, never the path. Costs about 1.5 us."""
        if (handler, method) not in self._http_durations:
            if len(self._http_durations) >= MAX_HTTP_SERIES:
                handler, method = "other", "other"
            self._http_durations.setdefault((handler, method), Histogram(HTTP_DURATION))
        key = (handler, method, f"{status // 100}xx")
        self._http_counts[key] = self._http_counts.get(key, 0) + 1
        self._http_durations[handler, method].observe(seconds)

    def render(self) -> bytes:
        """The text format 0.0.4 (CONTENT_TYPE). Takes a few milliseconds."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """For prometheus-client."""
        stats = self.stats()
        for scheme in self._schemes:
            yield from scheme.collect(stats)
        requests = CounterMetricFamily(
            "http_requests", "HTTP requests by handler, method and status.", labels=["handler", "method", "status"]
        )
        for key, count in self._http_counts.items():
            requests.add_metric(key, count)
        durations = HistogramMetricFamily(
            "http_request_duration_seconds",
            "Seconds from a request's head to the end of its response.",
            labels=["handler", "method"],
        )
        for labels, histogram in self._http_durations.items():
            durations.add_metric(labels, *histogram.buckets())
        yield requests
        yield durations
        failures = CounterMetricFamily(
            "oneloop_request_failures", "Requests that ended by an error of their own, by part.", labels=["domain"]
        )
        for domain, count in self.failures.items():
            failures.add_metric([domain], count)
        yield failures
        yield CounterMetricFamily("oneloop_failed_steps", "Steps that failed.", value=self.failed_steps)
        stage = "0 calm, 1 host caches were emptied, 2 new requests get a 429, 3 they get a 503 (--max-host-memory)."
        yield GaugeMetricFamily("oneloop_memory_stage", stage, value=self.memory_stage)
        yield CounterMetricFamily("oneloop_memory_sheds", "Times host caches were emptied.", value=self.memory_sheds)
        cut = CounterMetricFamily("oneloop_connections_cut", "Connections cut off, by reason.", labels=["reason"])
        for reason, count in self.connections_cut.items():
            cut.add_metric([reason], count)
        yield cut
        violations = "Times that the KV cache's books were wrong and were begun anew."
        yield CounterMetricFamily("oneloop_kv_violations", violations, value=self.kv_violations)
        yield GaugeMetricFamily(
            "oneloop_loop_utilisation",
            "Share of the last tenth of a second in which the event loop's thread ran or waited for a processor.",
            self.loop_utilisation,
        )
        lag = HistogramMetricFamily("oneloop_loop_lag_seconds", "How late a timer of the event loop comes.")
        lag.add_metric([], *self.loop_lag.buckets())
        yield lag
        for others in self._others:
            yield from others()


class _Families:
    """Builds families that share a prefix and labels."""

    def __init__(self, prefix: str, labels: dict[str, str]) -> None:
        self._prefix = prefix
        self._names = list(labels)
        self._values = list(labels.values())

    def gauge(self, name: str, help: str, value: float) -> Metric:
        return self._one(GaugeMetricFamily(self._prefix + name, help, labels=self._names), value)

    def counter(self, name: str, help: str, value: float) -> Metric:
        """Without _total, which the format adds."""
        return self._one(CounterMetricFamily(self._prefix + name, help, labels=self._names), value)

    def _one(self, family: GaugeMetricFamily | CounterMetricFamily, value: float) -> Metric:
        family.add_metric(self._values, value)
        return family

    def gauges(self, name: str, help: str, label: str, values: Iterable[tuple[str, float]]) -> Metric:
        family = GaugeMetricFamily(self._prefix + name, help, labels=[*self._names, label])
        for key, value in values:
            family.add_metric([*self._values, key], value)
        return family

    def counters(self, name: str, help: str, label: str, values: Iterable[tuple[str, float]]) -> Metric:
        family = CounterMetricFamily(self._prefix + name, help, labels=[*self._names, label])
        for key, value in values:
            family.add_metric([*self._values, key], value)
        return family

    def info(self, name: str, help: str, labels: dict[str, str]) -> Metric:
        family = GaugeMetricFamily(self._prefix + name, help, labels=[*self._names, *labels])
        if labels:
            family.add_metric([*self._values, *labels.values()], 1)
        return family

    def histogram(self, name: str, help: str, histogram: Histogram) -> Metric:
        family = HistogramMetricFamily(self._prefix + name, help, labels=self._names)
        family.add_metric(self._values, *histogram.buckets())
        return family

    def histograms(self, name: str, help: str, label: str, values: Sequence[str], histogram: Histogram) -> Metric:
        family = HistogramMetricFamily(self._prefix + name, help, labels=[*self._names, label])
        for row, value in enumerate(values):
            family.add_metric([*self._values, value], *histogram.buckets(row))
        return family


class _Vllm:
    """vLLM's names, buckets and labels, under any prefix."""

    def __init__(self, metrics: EngineMetrics, model_name: str, prefix: str) -> None:
        self._metrics = metrics
        self._model_name = model_name
        self._prefix = f"{prefix}:"
        self._families = _Families(self._prefix, {"model_name": model_name, "engine": "0"})
        self.ttft = Histogram(VLLM_TTFT, 2)
        self.inter_token = Histogram(VLLM_TOKEN)
        self.per_output_token = Histogram(VLLM_TOKEN, 2)
        self.e2e = Histogram(VLLM_REQUEST, 2)
        self.queue = Histogram(VLLM_REQUEST)

    def collect(self, stats: EngineStats) -> Iterator[Metric]:
        metrics, f = self._metrics, self._families
        yield f.gauge("num_requests_running", "Requests in the running batch.", stats.num_running)
        yield f.gauge("num_requests_waiting", "Requests that wait to be scheduled.", stats.num_waiting)
        yield f.gauges(
            "num_requests_waiting_by_reason",
            "Requests that wait, by reason.",
            "reason",
            [("capacity", stats.num_waiting), ("deferred", 0)],
        )
        yield f.gauge("kv_cache_usage_perc", "Share of the KV cache in use, 1 is all of it.", stats.kv_usage)
        yield f.gauge("gpu_cache_usage_perc", "Older name of kv_cache_usage_perc.", stats.kv_usage)
        yield f.counter("prefix_cache_queries", "Prompt tokens looked up.", metrics.prefix_cache_queries)
        yield f.counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.", metrics.prefix_cache_hits)
        yield f.counter("num_preemptions", "Sequences retracted for want of pages.", metrics.num_preemptions)
        if (drafts := metrics.drafts) is not None:
            yield f.counter("spec_decode_num_drafts", "Rows of steps whose drafts were checked.", drafts.num_drafts)
            yield f.counter("spec_decode_num_draft_tokens", "Drafts that were checked.", drafts.num_draft_tokens)
            yield f.counter("spec_decode_num_accepted_tokens", "Drafts that were right.", drafts.num_accepted_tokens)
            yield f.counters(
                "spec_decode_num_accepted_tokens_per_pos",
                "Drafts that were right, by their place in the row.",
                "position",
                [(str(place), float(count)) for place, count in enumerate(drafts.accepted_by_position)],
            )
        yield f.counter("prompt_tokens", "Prompt tokens.", metrics.prompt_tokens)
        yield f.counter("generation_tokens", "Generated tokens.", metrics.generation_tokens)
        cached = metrics.finished_cached_tokens
        yield f.counter("prompt_tokens_cached", "Prompt tokens of finished requests from the cache.", cached)
        yield f.counters(
            "prompt_tokens_by_source",
            "Prompt tokens of finished requests by where their KV came from.",
            "source",
            [("local_compute", metrics.finished_computed_tokens), ("local_cache_hit", cached)],
        )
        finished = [(reason.value, count) for reason, count in metrics.finished.items()]
        yield f.counters(
            "request_success", "Finished requests by reason.", "finished_reason", [*finished, ("repetition", 0)]
        )
        rejected = CounterMetricFamily(
            f"{self._prefix}admission_rejections", "Requests refused at the door.", labels=["model_name", "reason"]
        )
        for reason, count in metrics.rejected.items():
            rejected.add_metric([self._model_name, reason], count)
        yield rejected
        yield f.histogram("time_to_first_token_seconds", "Seconds from arrival to the first token.", self.ttft)
        yield f.histogram("inter_token_latency_seconds", "Seconds between two tokens.", self.inter_token)
        yield f.histogram(
            "request_time_per_output_token_seconds",
            "Decode seconds by output tokens but the first, per request.",
            self.per_output_token,
        )
        yield f.histogram("e2e_request_latency_seconds", "Seconds from arrival to the end.", self.e2e)
        yield f.histogram("request_queue_time_seconds", "Seconds from arrival to the first launch.", self.queue)
        yield f.histogram("request_inference_time_seconds", "Seconds from first launch to end.", metrics.inference)
        yield f.histogram("request_prefill_time_seconds", "Seconds from launch to first token.", metrics.prefill)
        yield f.histogram("request_decode_time_seconds", "Seconds from first to last token.", metrics.decode)
        yield f.histogram("request_prompt_tokens", "Prompt tokens of a request.", metrics.num_prompt)
        yield f.histogram("request_generation_tokens", "Generated tokens of a request.", metrics.num_generation)
        yield f.histogram(
            "request_max_num_generation_tokens", "Most tokens of a request's sequences.", metrics.num_generation
        )
        yield f.histogram("request_params_max_tokens", "max_tokens of a request.", metrics.max_tokens)
        yield f.histogram("request_params_n", "n of a request.", metrics.n)
        yield f.histogram(
            "request_prefill_kv_computed_tokens", "Prompt tokens that were computed, not cached.", metrics.num_computed
        )
        yield f.histogram("iteration_tokens_total", "Tokens computed in a step.", metrics.step_tokens)
        yield f.info("cache_config_info", "How the KV cache is configured.", metrics.cache_config)
        # Not vLLM's, but asked for.
        yield f.counter("evicted_tokens", "Cached tokens given up.", stats.tokens_of(metrics.evicted_pages))
        yield f.gauges(
            "startup_time_seconds", "Seconds of each phase of the start.", "phase", metrics.startup_seconds.items()
        )


class Rates:
    """throughput: generated tokens a second; hit_rate: 0..1, share of looked up prompt tokens that the cache had.

    Both over the time since the last `update`, so each reader has its own.
    """

    def __init__(self, metrics: EngineMetrics, now: Callable[[], float]) -> None:
        self.throughput = self.hit_rate = 0.0
        self._metrics = metrics
        self._now = now
        self._read = (now(), 0, 0, 0)

    def update(self) -> None:
        metrics, now = self._metrics, self._now()
        then, tokens, hits, queries = self._read
        if now - then < MIN_RATE_SECONDS:
            return
        self.throughput = (metrics.generation_tokens - tokens) / (now - then)
        if metrics.prefix_cache_queries > queries:
            self.hit_rate = (metrics.prefix_cache_hits - hits) / (metrics.prefix_cache_queries - queries)
        self._read = now, metrics.generation_tokens, metrics.prefix_cache_hits, metrics.prefix_cache_queries


class _Sglang:
    """SGLang's names, buckets and labels."""

    def __init__(self, metrics: EngineMetrics, model_name: str, now: Callable[[], float]) -> None:
        self._metrics = metrics
        labels = {"model_name": model_name, "engine_type": "unified"}
        self._requests = _Families("sglang:", labels)
        self._scheduler = _Families("sglang:", {**labels, "tp_rank": "0", "pp_rank": "0", "moe_ep_rank": "0"})
        self.ttft = Histogram(SGLANG_TTFT, 2)
        self.inter_token = Histogram(SGLANG_TOKEN)
        self.per_output_token = Histogram(SGLANG_TOKEN, 2)
        self.e2e = Histogram(SGLANG_REQUEST, 2)
        self.queue = Histogram(SGLANG_QUEUE)
        self._rates = Rates(metrics, now)

    def collect(self, stats: EngineStats) -> Iterator[Metric]:
        metrics, s, r = self._metrics, self._scheduler, self._requests
        self._rates.update()
        available = stats.num_total_tokens - stats.num_used_tokens
        yield s.gauge("num_running_reqs", "Requests in the running batch.", stats.num_running)
        yield s.gauge("num_queue_reqs", "Requests that wait to be scheduled.", stats.num_waiting)
        yield s.gauge("token_usage", "Share of the KV cache in use, 1 is all of it.", stats.kv_usage)
        yield s.gauge("num_used_tokens", "Tokens of the KV cache in use.", stats.num_used_tokens)
        yield s.gauge("max_total_num_tokens", "Tokens that the KV cache holds.", stats.num_total_tokens)
        yield s.gauge("page_size", "Tokens of a page.", stats.page_size)
        yield s.gauge("kv_used_tokens", "Tokens of the KV cache in use.", stats.num_used_tokens)
        yield s.gauge("kv_available_tokens", "Tokens of the KV cache that are free.", available)
        evictable = stats.tokens_of(stats.num_evictable_pages)
        yield s.gauge("kv_evictable_tokens", "Tokens that only the radix tree holds.", evictable)
        yield s.gauge("gen_throughput", "Generated tokens a second since the last scrape.", self._rates.throughput)
        yield s.gauge(
            "cache_hit_rate", "Share of looked up prompt tokens found, since the last scrape.", self._rates.hit_rate
        )
        yield s.counter("num_retracted_requests", "Sequences retracted for want of pages.", metrics.num_preemptions)
        yield s.counter("evicted_tokens", "Cached tokens given up.", stats.tokens_of(metrics.evicted_pages))
        yield s.gauges(
            "startup_time_seconds", "Seconds of each phase of the start.", "phase", metrics.startup_seconds.items()
        )
        yield s.histogram("queue_time_seconds", "Seconds from arrival to the first launch.", self.queue)
        yield r.counter("prompt_tokens", "Prompt tokens.", metrics.prompt_tokens)
        yield r.counter("generation_tokens", "Generated tokens.", metrics.generation_tokens)
        yield r.counters(
            "cached_tokens",
            "Prompt tokens of finished requests from the cache.",
            "cache_source",
            [("device", metrics.finished_cached_tokens)],
        )
        yield r.counter("num_requests", "Finished requests.", sum(metrics.finished.values()))
        yield r.counter("num_aborted_requests", "Aborted requests.", metrics.finished[FinishReason.ABORT])
        for name, help, histogram in (
            ("time_to_first_token_seconds", "Seconds from arrival to the first token.", self.ttft),
            ("e2e_request_latency_seconds", "Seconds from arrival to the end.", self.e2e),
            ("request_time_per_output_token_seconds", "Decode seconds by tokens but the first.", self.per_output_token),
        ):
            yield r.histograms(name, help, "is_streaming", _STREAMING, histogram)
        yield r.histogram("inter_token_latency_seconds", "Seconds between two tokens.", self.inter_token)

"""EngineMetrics: exact family names, buckets and labels, read back with prometheus_client's own parser."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from engine import metrics as module
from engine.config import StartupError
from engine.metrics import EngineMetrics, EngineStats, Histogram, one_two_five
from engine.request import FinishReason

STATS = EngineStats(
    num_running=3,
    num_waiting=2,
    num_used_pages=25,
    num_total_pages=100,
    page_size=16,
    num_evictable_pages=4,
    num_total_tokens=1600,
)
LABELS = {"model_name": "tiny", "engine": "0"}

VLLM = {
    "num_requests_running": "gauge",
    "num_requests_waiting": "gauge",
    "num_requests_waiting_by_reason": "gauge",
    "kv_cache_usage_perc": "gauge",
    "gpu_cache_usage_perc": "gauge",
    "prefix_cache_queries": "counter",
    "prefix_cache_hits": "counter",
    "num_preemptions": "counter",
    "prompt_tokens": "counter",
    "generation_tokens": "counter",
    "prompt_tokens_cached": "counter",
    "prompt_tokens_by_source": "counter",
    "request_success": "counter",
    "admission_rejections": "counter",
    "time_to_first_token_seconds": "histogram",
    "inter_token_latency_seconds": "histogram",
    "request_time_per_output_token_seconds": "histogram",
    "e2e_request_latency_seconds": "histogram",
    "request_queue_time_seconds": "histogram",
    "request_inference_time_seconds": "histogram",
    "request_prefill_time_seconds": "histogram",
    "request_decode_time_seconds": "histogram",
    "request_prompt_tokens": "histogram",
    "request_generation_tokens": "histogram",
    "request_max_num_generation_tokens": "histogram",
    "request_params_max_tokens": "histogram",
    "request_params_n": "histogram",
    "request_prefill_kv_computed_tokens": "histogram",
    "iteration_tokens_total": "histogram",
    "cache_config_info": "gauge",
    "evicted_tokens": "counter",
    "startup_time_seconds": "gauge",
}
SGLANG = {
    "num_running_reqs": "gauge",
    "num_queue_reqs": "gauge",
    "token_usage": "gauge",
    "num_used_tokens": "gauge",
    "max_total_num_tokens": "gauge",
    "page_size": "gauge",
    "kv_used_tokens": "gauge",
    "kv_available_tokens": "gauge",
    "kv_evictable_tokens": "gauge",
    "gen_throughput": "gauge",
    "cache_hit_rate": "gauge",
    "num_retracted_requests": "counter",
    "evicted_tokens": "counter",
    "startup_time_seconds": "gauge",
    "queue_time_seconds": "histogram",
    "prompt_tokens": "counter",
    "generation_tokens": "counter",
    "cached_tokens": "counter",
    "num_requests": "counter",
    "num_aborted_requests": "counter",
    "time_to_first_token_seconds": "histogram",
    "e2e_request_latency_seconds": "histogram",
    "request_time_per_output_token_seconds": "histogram",
    "inter_token_latency_seconds": "histogram",
}


class Time:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def make(prefix: str = "vllm", now: Time | None = None) -> EngineMetrics:
    metrics = EngineMetrics("tiny", prefix=prefix, max_model_len=2048, now=now or Time())
    metrics.bind(lambda: STATS)
    return metrics


def parse(metrics: EngineMetrics) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(metrics.render().decode())}


def value(families: dict[str, Metric], sample_name: str, **labels: str) -> float:
    found = [
        sample.value
        for family in families.values()
        for sample in family.samples
        if sample.name == sample_name and labels.items() <= sample.labels.items()
    ]
    assert len(found) == 1, (sample_name, labels, found)
    return found[0]


def bounds(families: dict[str, Metric], name: str) -> list[float]:
    return [float(s.labels["le"]) for s in families[name].samples if s.name == f"{name}_bucket"]


def run(metrics: EngineMetrics) -> None:
    """Two requests that finish, one that is aborted, one that is refused."""
    metrics.prompt_tokens, metrics.generation_tokens = 300, 40
    metrics.prefix_cache_queries, metrics.prefix_cache_hits = 300, 64
    metrics.num_preemptions, metrics.evicted_pages = 1, 5
    for tokens in (200, 100, 3):
        metrics.on_step(tokens)
    metrics.on_first_token(0.03, 0.01, 0.02)
    metrics.on_first_token(0.5, 0.4, 0.1, stream=False)
    metrics.observe_inter_token(np.array([0.01, 0.02, 0.3]))
    metrics.on_finished(FinishReason.STOP, 100, 11, 64, 0.6, 0.5, max_tokens=32, queue_time=0.1)
    metrics.on_finished(FinishReason.LENGTH, 200, 1, 0, 1.0, 0.0, n=2, queue_time=2.0, stream=False)
    metrics.on_finished(FinishReason.ABORT, 7, 0, 0, 9.0)
    metrics.on_rejected("queue_full")
    metrics.set_startup_seconds("load_weights", 1.5)
    metrics.set_cache_config(block_size=16, num_gpu_blocks=100, enable_prefix_caching=True)


@pytest.mark.parametrize("prefix", ["vllm", "oneloop", "sglang"])
def test_exact_families(prefix: str) -> None:
    metrics = make(prefix)
    run(metrics)
    families = parse(metrics)
    expected = SGLANG if prefix == "sglang" else VLLM
    found = {name: family.type for name, family in families.items() if name.startswith(f"{prefix}:")}
    assert found == {f"{prefix}:{name}": kind for name, kind in expected.items()}
    others = set(families) - set(found)
    assert {"process_cpu_seconds", "process_resident_memory_bytes", "python_gc_collections"} <= others
    # The loop's own have no peer, and one name under every prefix.
    assert families["oneloop_loop_utilisation"].type == "gauge"
    assert families["oneloop_loop_lag_seconds"].type == "histogram"
    assert all(name.startswith(("process_", "python_gc_", "http_", "oneloop_")) for name in others)
    assert all(family.documentation for family in families.values())


def test_both_prefixes_have_all_families() -> None:
    families = parse(make("both"))
    assert {f"vllm:{name}" for name in VLLM} | {f"sglang:{name}" for name in SGLANG} <= set(families)


def test_bad_prefix() -> None:
    with pytest.raises(StartupError, match="--metrics-prefix"):
        EngineMetrics("tiny", prefix="a:b")


def test_everything_is_there_before_anything_happened() -> None:
    """Dashboards divide by these: a missing series is a hole, a zero is not."""
    families = parse(EngineMetrics("tiny"))
    assert value(families, "vllm:generation_tokens_total", **LABELS) == 0
    assert value(families, "vllm:num_requests_running", **LABELS) == 0
    assert value(families, "vllm:kv_cache_usage_perc", **LABELS) == 0
    for reason in ("stop", "length", "abort", "error", "repetition"):
        assert value(families, "vllm:request_success_total", finished_reason=reason, **LABELS) == 0
    assert value(families, "vllm:time_to_first_token_seconds_count", **LABELS) == 0


def test_vllm_values() -> None:
    metrics = make()
    run(metrics)
    families = parse(metrics)

    def of(name: str, **labels: str) -> float:
        return value(families, f"vllm:{name}", **LABELS, **labels)

    assert of("num_requests_running") == 3
    assert of("num_requests_waiting") == 2
    assert of("num_requests_waiting_by_reason", reason="capacity") == 2
    assert of("kv_cache_usage_perc") == of("gpu_cache_usage_perc") == 0.25
    assert of("prompt_tokens_total") == 300
    assert of("generation_tokens_total") == 40
    assert of("prefix_cache_queries_total") == 300
    assert of("prefix_cache_hits_total") == 64
    assert of("num_preemptions_total") == 1
    assert of("evicted_tokens_total") == 80
    assert of("prompt_tokens_cached_total") == 64
    assert of("prompt_tokens_by_source_total", source="local_compute") == 100 - 64 + 200 + 7
    assert of("prompt_tokens_by_source_total", source="local_cache_hit") == 64
    assert of("request_success_total", finished_reason="stop") == 1
    assert of("request_success_total", finished_reason="length") == 1
    assert of("request_success_total", finished_reason="abort") == 1
    assert of("startup_time_seconds", phase="load_weights") == 1.5
    assert of("cache_config_info", block_size="16", num_gpu_blocks="100", enable_prefix_caching="True") == 1
    [rejected] = families["vllm:admission_rejections"].samples
    assert (rejected.labels, rejected.value) == ({"model_name": "tiny", "reason": "queue_full"}, 1)

    assert of("time_to_first_token_seconds_count") == 2
    assert of("time_to_first_token_seconds_sum") == pytest.approx(0.53)
    assert of("time_to_first_token_seconds_bucket", le="0.02") == 0
    assert of("time_to_first_token_seconds_bucket", le="0.04") == 1
    assert of("time_to_first_token_seconds_bucket", le="0.5") == 2  # a value on a bound is not above it
    assert of("inter_token_latency_seconds_count") == 3
    assert of("inter_token_latency_seconds_bucket", le="0.01") == 1
    assert of("inter_token_latency_seconds_bucket", le="0.3") == 3
    # Aborted requests leave no latency and no length; one token has no time per token after the first.
    assert of("e2e_request_latency_seconds_count") == 2
    assert of("e2e_request_latency_seconds_sum") == pytest.approx(1.6)
    assert of("request_time_per_output_token_seconds_count") == 1
    assert of("request_time_per_output_token_seconds_sum") == pytest.approx(0.05)
    assert of("request_queue_time_seconds_sum") == pytest.approx(0.41)
    assert of("request_prefill_time_seconds_sum") == pytest.approx(0.12)
    assert of("request_decode_time_seconds_sum") == pytest.approx(0.5)
    assert of("request_inference_time_seconds_sum") == pytest.approx(0.5)
    assert of("request_prompt_tokens_sum") == 300
    assert of("request_generation_tokens_sum") == 12
    assert of("request_max_num_generation_tokens_sum") == 12
    assert of("request_prefill_kv_computed_tokens_sum") == 236
    assert of("request_params_max_tokens_count") == 1
    assert of("request_params_n_sum") == 3
    assert of("iteration_tokens_total_count") == metrics.num_steps == 3
    assert of("iteration_tokens_total_sum") == 303


def test_vllm_buckets() -> None:
    families = parse(make())
    ttft = [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80]
    assert bounds(families, "vllm:time_to_first_token_seconds") == [*ttft, 160, 640, 2560, np.inf]
    token = [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, np.inf]
    assert bounds(families, "vllm:inter_token_latency_seconds") == token
    assert bounds(families, "vllm:request_time_per_output_token_seconds") == token
    request = [0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680, np.inf]
    for name in ("e2e_request_latency", "request_queue_time", "request_inference_time", "request_prefill_time"):
        assert bounds(families, f"vllm:{name}_seconds") == request
    lengths = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, np.inf]
    assert bounds(families, "vllm:request_prompt_tokens") == lengths
    assert bounds(families, "vllm:request_params_n") == [1, 2, 5, 10, 20, np.inf]
    assert bounds(families, "vllm:iteration_tokens_total") == [1, *(2**i for i in range(3, 15)), np.inf]
    les = [s.labels["le"] for s in families["vllm:request_params_n"].samples if s.name.endswith("_bucket")]
    assert les == ["1.0", "2.0", "5.0", "10.0", "20.0", "+Inf"]


def test_sglang_values_and_labels() -> None:
    clock = Time()
    metrics = make("sglang", clock)
    run(metrics)
    clock.now += 2
    families = parse(metrics)
    labels = {"model_name": "tiny", "engine_type": "unified"}
    scheduler = {**labels, "tp_rank": "0", "pp_rank": "0", "moe_ep_rank": "0"}
    assert value(families, "sglang:num_running_reqs", **scheduler) == 3
    assert value(families, "sglang:num_queue_reqs", **scheduler) == 2
    assert value(families, "sglang:token_usage", **scheduler) == 0.25
    assert value(families, "sglang:num_used_tokens", **scheduler) == 400
    assert value(families, "sglang:kv_available_tokens", **scheduler) == 1200
    assert value(families, "sglang:kv_evictable_tokens", **scheduler) == 64
    assert value(families, "sglang:max_total_num_tokens", **scheduler) == 1600
    assert value(families, "sglang:gen_throughput", **scheduler) == 20
    assert value(families, "sglang:cache_hit_rate", **scheduler) == pytest.approx(64 / 300)
    assert value(families, "sglang:cached_tokens_total", cache_source="device", **labels) == 64
    assert value(families, "sglang:num_requests_total", **labels) == 3
    assert value(families, "sglang:num_aborted_requests_total", **labels) == 1
    for stream, ttft, e2e in (("true", 0.03, 0.6), ("false", 0.5, 1.0)):
        split = {**labels, "is_streaming": stream}
        assert value(families, "sglang:time_to_first_token_seconds_sum", **split) == pytest.approx(ttft)
        assert value(families, "sglang:e2e_request_latency_seconds_sum", **split) == pytest.approx(e2e)
    first = [s for s in families["sglang:e2e_request_latency_seconds"].samples if s.labels["is_streaming"] == "true"]
    found = [float(s.labels["le"]) for s in first if "le" in s.labels]
    assert found == [
        *(0.1, 0.2, 0.4, 0.6, 0.8, 1, 2, 4, 6, 8, 10, 20, 40, 60, 80, 100, 200, 400, 600, 1200, 1800, 2400, np.inf)
    ]
    token = [0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.025, 0.03, 0.035, 0.04, 0.06, 0.08, 0.1, 0.2, 0.4, 0.6]
    assert bounds(families, "sglang:inter_token_latency_seconds") == [*token, 0.8, 1, 2, 4, 6, 8, np.inf]


def test_rates_are_over_the_time_since_the_last_scrape() -> None:
    clock = Time()
    metrics = make("sglang", clock)

    def rates() -> tuple[float, float]:
        families = parse(metrics)
        return value(families, "sglang:gen_throughput"), value(families, "sglang:cache_hit_rate")

    assert rates() == (0, 0)
    metrics.generation_tokens, metrics.prefix_cache_queries, metrics.prefix_cache_hits = 100, 10, 5
    clock.now += 0.5
    assert rates() == (0, 0)  # too short a span to tell
    clock.now += 4.5
    assert rates() == (20, 0.5)
    clock.now += 5
    assert rates() == (0, 0.5)  # nothing generated; nothing was looked up, so the share stays


def test_http() -> None:
    metrics = make()
    for status, seconds in ((200, 0.05), (201, 0.1), (404, 3.0)):
        metrics.observe_http("/v1/models", "GET", status, seconds)
    families = parse(metrics)
    labels = {"handler": "/v1/models", "method": "GET"}
    assert value(families, "http_requests_total", status="2xx", **labels) == 2
    assert value(families, "http_requests_total", status="4xx", **labels) == 1
    assert value(families, "http_request_duration_seconds_count", **labels) == 3
    assert value(families, "http_request_duration_seconds_sum", **labels) == pytest.approx(3.15)
    assert value(families, "http_request_duration_seconds_bucket", le="0.1", **labels) == 2


def test_http_series_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_HTTP_SERIES", 3)
    metrics = make()
    for index in range(10):
        metrics.observe_http(f"/{index}", "GET", 200, 0.1)
        metrics.observe_http("/0", "GET", 200, 0.1)
    families = parse(metrics)
    assert value(families, "http_requests_total", handler="other") == 7
    assert value(families, "http_requests_total", handler="/0") == 11


def test_two_engines_do_not_share_anything() -> None:
    first, second = make(), make()
    first.on_step(5)
    first.generation_tokens += 1
    assert second.num_steps == second.generation_tokens == 0
    assert value(parse(second), "vllm:iteration_tokens_total_count") == 0
    assert module.CONTENT_TYPE.startswith("text/plain; version=0.0.4")


def test_one_two_five() -> None:
    assert one_two_five(1) == (1,)
    assert one_two_five(60) == (1, 2, 5, 10, 20, 50)
    assert one_two_five(100) == (1, 2, 5, 10, 20, 50, 100)


@given(st.lists(st.floats(0, 100, width=32), max_size=50))
def test_many_observations_equal_single_ones(values: list[float]) -> None:
    edges = [0.0, 0.5, 1.0, 10.0]
    one, many = Histogram(edges), Histogram(edges)
    for item in values:
        one.observe(item)
    many.observe_many(np.array(values))
    assert one.counts.tolist() == many.counts.tolist()
    assert one.sums.tolist() == pytest.approx(many.sums.tolist())
    buckets, total = many.buckets()
    assert buckets == [(le, sum(v <= float(le) for v in values)) for le in ("0.0", "0.5", "1.0", "10.0", "+Inf")]
    assert total == pytest.approx(sum(values))


def test_stats() -> None:
    assert (STATS.num_used_tokens, STATS.num_total_tokens, STATS.kv_usage) == (400, 1600, 0.25)
    assert EngineStats().kv_usage == 0.0

"""TransferTally: what is counted of pages between servers, by vLLM's names where it has one. Loop thread."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from engine.metrics import Histogram

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 5.0)
BYTES = tuple(2**power for power in range(10, 36, 2))


class TransferTally:
    """failures: by why pages were not had; not_kept, let_go: of pages that were to be read here."""

    def __init__(self, prefixes: list[str], model_name: str) -> None:
        self.failures: Counter[str] = Counter()
        self.not_kept: Counter[str] = Counter()
        self.let_go: Counter[str] = Counter()
        self.recomputed_tokens = self.queried_tokens = self.hit_tokens = 0
        self.num_kept_pages: Callable[[], int] = lambda: 0
        self._prefixes = prefixes
        self._model_name = model_name
        self._seconds, self._bytes = Histogram(SECONDS), Histogram(BYTES)

    def transferred(self, num_bytes: int, num_tokens: int, seconds: float) -> None:
        """Pages of so many tokens were read."""
        self.hit_tokens += num_tokens
        self._bytes.observe(num_bytes)
        self._seconds.observe(seconds)

    def collect(self) -> Iterator[Metric]:
        """The families of a scrape."""
        labels = [self._model_name]
        for prefix in self._prefixes:
            for name, text, value in (
                ("external_prefix_cache_queries", "Prompt tokens asked for elsewhere.", self.queried_tokens),
                ("external_prefix_cache_hits", "Prompt tokens had from elsewhere.", self.hit_tokens),
                ("nixl_num_failed_transfers", "Transfers that brought nothing.", sum(self.failures.values())),
                ("nixl_num_kv_expired_reqs", "Prompts whose pages nobody read in time.", self.let_go["expired"]),
            ):
                counter = CounterMetricFamily(f"{prefix}:{name}", text, labels=["model_name"])
                counter.add_metric(labels, value)
                yield counter
            for name, text, histogram in (
                ("nixl_xfer_time_seconds", "Seconds of a transfer.", self._seconds),
                ("nixl_bytes_transferred", "Bytes of a transfer.", self._bytes),
            ):
                family = HistogramMetricFamily(f"{prefix}:{name}", text, labels=["model_name"])
                family.add_metric(labels, *histogram.buckets())
                yield family
        for name, text, label, counts in (
            ("failures", "Prompts whose pages were not had from elsewhere, by why.", "reason", self.failures),
            ("not_kept", "Prompts whose pages could not be kept for a reader, by why.", "reason", self.not_kept),
            ("let_go", "Prompts whose pages are not kept any more, by why.", "reason", self.let_go),
        ):
            family_ = CounterMetricFamily(f"oneloop_kv_transfer_{name}", text, labels=[label])
            for reason, count in counts.items():
                family_.add_metric([reason], count)
            yield family_
        yield CounterMetricFamily(
            "oneloop_kv_transfer_recomputed_tokens",
            "Prompt tokens computed here because they could not be had.",
            value=self.recomputed_tokens,
        )
        yield GaugeMetricFamily(
            "oneloop_kv_transfer_kept_pages", "Pages that are kept for readers.", value=self.num_kept_pages()
        )

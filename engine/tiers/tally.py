"""TierTally: what is counted of pages on the disk. Loop thread; collected with the other metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from engine.tiers.disk import PageStore
from engine.tiers.worker import Worker


class TierTally:
    """failures: prompts by why pages of them were not read or not written."""

    def __init__(self, store: PageStore, worker: Worker) -> None:
        self.failures: Counter[str] = Counter()
        self.queried_tokens = self.hit_tokens = 0
        self._store, self._worker = store, worker

    def collect(self) -> Iterator[Metric]:
        """The families of a scrape."""
        store, worker = self._store, self._worker
        for name, text, count in (
            ("queried_tokens", "Prompt tokens that were looked for on the disk.", self.queried_tokens),
            ("hit_tokens", "Prompt tokens whose KV, and state, was read from the disk.", self.hit_tokens),
            ("read_bytes", "Bytes of pages and states read.", worker.num_bytes_read),
            ("written_bytes", "Bytes of pages and states written.", worker.num_bytes_written),
            ("damaged_files", "Files that failed their check and were removed.", store.num_corrupt),
        ):
            yield CounterMetricFamily(f"oneloop_kv_disk_{name}", text, value=count)
        failures = CounterMetricFamily(
            "oneloop_kv_disk_failures", "Prompts whose pages were not read or not written, by why.", labels=["reason"]
        )
        for reason, count in self.failures.items():
            failures.add_metric([reason], count)
        yield failures
        yield GaugeMetricFamily("oneloop_kv_disk_bytes", "Bytes of pages and states on the disk.", value=store.bytes)
        yield GaugeMetricFamily("oneloop_kv_disk_files", "Pages on the disk, and states.", value=len(store))

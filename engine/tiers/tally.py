"""TierTally: what is counted of pages in host memory and on the disk. Loop thread; collected with the other metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from engine.tiers.worker import Worker


class TierTally:
    """failures: prompts by why pages of them were not read or not written."""

    def __init__(self, worker: Worker) -> None:
        self.failures: Counter[str] = Counter()
        self.queried_tokens = self.hit_tokens = 0
        self._worker = worker

    def collect(self) -> Iterator[Metric]:
        """The families of a scrape. What prompts found is counted where they look first."""
        worker, disk, host = self._worker, self._worker.disk, self._worker.host
        first, where = ("disk", "on the disk") if host is None else ("host", "in host memory, or below it")
        counters: list[tuple[str, str, float]] = [
            (f"{first}_queried_tokens", f"Prompt tokens that were looked for {where}.", self.queried_tokens),
            (f"{first}_hit_tokens", f"Prompt tokens whose KV, and state, was found {where}.", self.hit_tokens),
        ]
        gauges: list[tuple[str, str, float]] = []
        if host is not None:
            counters += [
                ("host_loaded_bytes", "Bytes of pages and states copied to the device.", worker.num_bytes_in),
                ("host_stored_bytes", "Bytes of pages and states copied from the device.", worker.num_bytes_out),
                ("host_evicted_pages", "Pages and states that made room for others.", host.num_evicted),
            ]
            gauges += [
                ("host_bytes", "Bytes of pages and states in host memory.", host.num_bytes),
                ("host_max_bytes", "Bytes that there is room for.", host.max_bytes),
                ("host_pages", "Pages in host memory, and states.", host.num_rows),
            ]
        if disk is not None:
            counters += [
                ("disk_read_bytes", "Bytes of pages and states read.", worker.num_bytes_read),
                ("disk_written_bytes", "Bytes of pages and states written.", worker.num_bytes_written),
                ("disk_damaged_files", "Files that failed their check and were removed.", disk.num_corrupt),
            ]
            gauges += [
                ("disk_bytes", "Bytes of pages and states on the disk.", disk.bytes),
                ("disk_files", "Pages on the disk, and states.", len(disk)),
            ]
        for name, text, value in counters:
            yield CounterMetricFamily(f"oneloop_kv_{name}", text, value=value)
        failures = CounterMetricFamily(
            f"oneloop_kv_{first}_failures",
            "Prompts whose pages were not read or not written, by why.",
            labels=["reason"],
        )
        for reason, count in self.failures.items():
            failures.add_metric([reason], count)
        yield failures
        for name, text, value in gauges:
            yield GaugeMetricFamily(f"oneloop_kv_{name}", text, value=value)

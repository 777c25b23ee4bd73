"""The dashboards ask for metrics that a server has. Against a real Prometheus: `make test-dashboards`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import server
from tests.server.support import live

DASHBOARDS = Path(server.__file__).parent / "deploy" / "dashboards"
# A name that is followed by what only a metric can have, or that has a colon.
_METRIC = re.compile(r"\b([a-zA-Z_]\w*:\w+|[a-z]\w*(?=[{\[])|[a-z]\w*_(?:total|bytes|seconds|count|sum|bucket)\b|up\b)")


def panel_queries() -> list[str]:
    dashboard = json.loads((DASHBOARDS / "grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(queries) > 25
    return queries


def alert_queries() -> list[str]:
    text = (DASHBOARDS / "alerts.yml").read_text()
    queries = re.findall(r"expr: (?:>-\n)?((?:.(?!\n {8}\w+:))*.)", text, re.DOTALL)
    assert len(queries) == text.count("- alert:") >= 9
    return queries


async def test_every_metric_of_a_query_is_there(tmp_path: Path) -> None:
    prices = tmp_path / "prices.json"
    prices.write_text('{"prompt": 1}')
    async with live(prices=str(prices), max_queued_requests=1) as server:
        await server.complete("hello", max_tokens=3)
        server.engine.metrics.on_rejected("queue_full")
        async with server.http.get(f"{server.url}/metrics") as response:
            text = await response.text()
    there = set(re.findall(r"^([a-zA-Z_:][\w:]*)", text, re.MULTILINE)) | {"up"}
    asked = {name for query in (*panel_queries(), *alert_queries()) for name in _METRIC.findall(query)}
    assert len(asked) > 20 and not asked - there, f"no server has {sorted(asked - there)}"


def test_every_alert_is_provoked_and_silent_in_promtools_tests() -> None:
    names = re.findall(r"- alert: (\w+)", (DASHBOARDS / "alerts.yml").read_text())
    silent, provoked = (DASHBOARDS / "alerts_test.yml").read_text().split("everything at once")
    for name in names:
        assert f"alertname: {name}}}" in silent and f"alertname: {name}\n        exp_alerts:" in provoked, name

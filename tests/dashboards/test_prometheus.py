"""`make test-dashboards`: a real Prometheus scrapes a real server under load, and every panel has data; and promtool's
tests of the alerts. Needs Debian's package `prometheus`; ONELOOP_PROMETHEUS is the directory of its programs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from bench.server import free_port
from tests.server.support import Live, live
from tests.server.test_dashboards import DASHBOARDS, alert_queries, panel_queries

PROGRAMS = Path(os.environ.get("ONELOOP_PROMETHEUS", "/usr/bin"))
# Scrapes are a second apart: enough of them for a rate over the last ten.
SCRAPED_S = 15.0

pytestmark = pytest.mark.skipif(not (PROGRAMS / "promtool").exists(), reason="there is no promtool")


def promtool(*arguments: str) -> str:
    done = subprocess.run([PROGRAMS / "promtool", *arguments], cwd=DASHBOARDS, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_alerts_fire_when_they_should() -> None:
    promtool("check", "config", "prometheus.yml")
    assert "SUCCESS" in promtool("test", "rules", "alerts_test.yml")


@contextlib.asynccontextmanager
async def prometheus(target: int, directory: Path) -> AsyncIterator[str]:
    """One that scrapes a port every second; gives its URL."""
    config = (DASHBOARDS / "prometheus.yml").read_text().replace("127.0.0.1:8000", f"127.0.0.1:{target}")
    config = config.replace("scrape_interval: 5s", "scrape_interval: 1s").replace("[alerts.yml]", "[]")
    (directory / "prometheus.yml").write_text(config)
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        PROGRAMS / "prometheus",
        f"--config.file={directory / 'prometheus.yml'}",
        f"--storage.tsdb.path={directory / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=error",
    )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        await process.wait()


async def load(server: Live) -> None:
    """Requests that share prefixes, some of them refused, for as long as it is let."""
    number = 0
    while True:
        number += 1
        prompt = f"once upon a time there were {number % 7} foxes " * 6
        await server.post("/v1/completions", {"prompt": prompt, "max_tokens": 20, "stream": False})
        await server.post("/v1/completions", {"prompt": 7.5})


async def ask(http: aiohttp.ClientSession, url: str, query: str) -> list[Any]:
    async with http.get(f"{url}/api/v1/query", params={"query": query}) as response:
        answer = await response.json()
        assert answer["status"] == "success", (query, answer)
        return answer["data"]["result"]  # type: ignore[no-any-return]


async def test_every_panel_has_data(tmp_path: Path) -> None:
    prices = tmp_path / "prices.json"
    prices.write_text('{"currency": "EUR", "prompt": 1, "output": 2}')
    async with (
        live(prices=str(prices), step_seconds=0.005) as server,
        prometheus(server.port, tmp_path) as url,
    ):
        loads = [asyncio.create_task(load(server)) for _ in range(8)]
        await asyncio.sleep(SCRAPED_S)
        empty = []
        for query in panel_queries():
            filled = query.replace("$__rate_interval", "10s").replace("$model", ".*")
            if not await ask(server.http, url, filled):
                empty.append(query)
        for query in alert_queries():
            await ask(server.http, url, query)  # understood, and silent or not
        for task in loads:
            task.cancel()
        await asyncio.gather(*loads, return_exceptions=True)
    assert not empty

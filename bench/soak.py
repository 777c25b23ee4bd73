"""Hours of everything at once: `make soak MINUTES=30`.

One server, started here, under a mixed load of every API family: streams and whole answers, grammars, tools, embeddings
of nothing, bad bodies, clients that leave amid a stream, floods, aborts, sleeping and waking, new weights. Caches are
so small (--flags) that they are full after the warm-up, the first fifth: what grows then leaks. Every second the
process' resident memory and open files are read, and /metrics. Exits with 1 where the most memory of the last fifth is
more than that of the second by --most-growth-mb, with nobody there a file or a page is held, an answer was a 500, or a
stream had no end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from bench.server import running

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name"],
}
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": SCHEMA}}
# Sums and counts: of each second's, the mean is drawn.
_TIMES = re.compile(r"^(vllm:time_to_first_token|oneloop_loop_lag)_seconds_(sum|count)(?:\{[^}]*\})? (\S+)$", re.M)
_MODEL = Path(__file__).parent.parent / "engine" / "demo"
_HELD = re.compile(r"^vllm:(num_requests_running|num_requests_waiting|kv_cache_usage_perc)\{[^}]*\} (\S+)$", re.M)
STORM_EVERY_S, SLEEP_EVERY_S = 20.0, 60.0
STORM = 200


Row = tuple[float, int, int, int, float, float, float]


@dataclass
class Seen:
    """Answers by status or kind of end, and a row a second: seconds, bytes, files, requests that run, the share of
    pages in use, mean milliseconds of that second to a first token and by which the loop was late."""

    outcomes: Counter[str] = field(default_factory=Counter)
    rows: list[Row] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def draw(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """A route and a body."""
    words = " ".join(
        rng.choice(("fox", "castle", "Lena", "bike", "cake", "7", "Oslo")) for _ in range(rng.randint(1, 60))
    )
    chat = [{"role": "user", "content": words}]
    tokens, stream = rng.randint(1, 48), rng.random() < 0.6
    asked: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", {"messages": chat, "max_tokens": tokens, "stream": stream}),
        (
            "/v1/chat/completions",
            {"messages": chat, "max_tokens": tokens, "n": 3, "stream": stream, "logprobs": True},
        ),
        ("/v1/chat/completions", {"messages": chat, "tools": [TOOL], "tool_choice": "required", "max_tokens": 64}),
        ("/v1/completions", {"prompt": words, "max_tokens": tokens, "stream": stream, "stop": ["a"]}),
        ("/v1/completions", {"prompt": words, "max_tokens": 40, "guided_json": SCHEMA, "stream": stream}),
        ("/v1/responses", {"input": words, "max_output_tokens": tokens, "stream": stream}),
        ("/v1/responses", {"input": words, "max_output_tokens": tokens, "background": True}),
        ("/v1/messages", {"messages": chat, "max_tokens": tokens, "stream": stream}),
        ("/api/chat", {"messages": chat, "stream": stream, "options": {"num_predict": tokens}}),
        ("/generate", {"text": words, "sampling_params": {"max_new_tokens": tokens}, "stream": stream}),
        ("/completion", {"prompt": words, "n_predict": tokens, "stream": stream}),
        ("/tokenize", {"prompt": words}),
        ("/v1/chat/completions", {"messages": chat, "max_tokens": -5}),
        ("/v1/completions", {"prompt": [10**9], "max_tokens": 1}),
        ("/v1/embeddings", {"input": words}),
    ]
    return rng.choice(asked)


def _held(text: str) -> dict[str, float]:
    return {name: float(value) for name, value in _HELD.findall(text)}


class Soak:
    def __init__(self, url: str, pid: int, seconds: float, seed: int) -> None:
        self.url, self.pid, self.seconds = url, pid, seconds
        self.rng = random.Random(seed)
        self.seen = Seen()
        self.begun = time.monotonic()

    @property
    def is_over(self) -> bool:
        return time.monotonic() - self.begun > self.seconds

    async def client(self, session: aiohttp.ClientSession) -> None:
        while not self.is_over:
            await self.ask(session, leaves=self.rng.random() < 0.15)

    async def ask(self, session: aiohttp.ClientSession, *, leaves: bool) -> None:
        path, body = draw(self.rng)
        try:
            async with session.post(self.url + path, json=body) as response:
                if leaves:
                    await response.content.read(1)
                    response.close()
                    self.seen.outcomes["left"] += 1
                    return
                data = await response.read()
                self.seen.outcomes[str(response.status)] += 1
                if response.status >= 500 and response.status != 503:
                    self.seen.faults.append(f"{path}: {response.status} {data[:200]!r} to {json.dumps(body)[:200]}")
        except (aiohttp.ClientError, TimeoutError) as error:
            self.seen.outcomes[type(error).__name__] += 1
            self.seen.faults.append(f"{path}: {type(error).__name__}: {error}")

    async def storms(self, session: aiohttp.ClientSession) -> None:
        """Many at once, all of whom leave at once."""
        while not self.is_over:
            await asyncio.sleep(min(STORM_EVERY_S, self.seconds / 6))
            await asyncio.gather(*(self.ask(session, leaves=True) for _ in range(STORM)))
            async with session.post(self.url + "/abort_request", json={"rid": "none"}) as response:
                await response.read()

    async def sleeps(self, session: aiohttp.ClientSession) -> None:
        while not self.is_over:
            await asyncio.sleep(min(SLEEP_EVERY_S, self.seconds / 3))
            for path in ("/sleep?level=1&mode=keep", "/wake_up", "/pause?mode=keep", "/resume"):
                async with session.post(self.url + path) as response:
                    await response.read()
            body = {"model_path": str(_MODEL)}
            async with session.post(self.url + "/update_weights_from_disk", json=body) as response:
                if response.status != 200:
                    self.seen.faults.append(f"new weights: {response.status} {(await response.read())[:200]!r}")

    async def look(self, session: aiohttp.ClientSession) -> None:
        before: dict[str, float] = {}
        while not self.is_over:
            text = await self.metrics(session)
            held = _held(text)
            now = {f"{name} {part}": float(value) for name, part, value in _TIMES.findall(text)}
            news = {name: value - before.get(name, 0.0) for name, value in now.items()}
            before = now
            means = [
                1000 * news.get(f"{name} sum", 0.0) / (news.get(f"{name} count") or 1.0)
                for name in ("vllm:time_to_first_token", "oneloop_loop_lag")
            ]
            row = self.row(int(held.get("num_requests_running", 0)), held.get("kv_cache_usage_perc", 0.0), *means)
            self.seen.rows.append(row)
            await asyncio.sleep(1.0)

    def row(self, num_running: int, pages: float = 0.0, ttft_ms: float = 0.0, lag_ms: float = 0.0) -> Row:
        resident = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        files = len(os.listdir(f"/proc/{self.pid}/fd"))
        return time.monotonic() - self.begun, resident, files, num_running, pages, ttft_ms, lag_ms

    async def metrics(self, session: aiohttp.ClientSession) -> str:
        async with session.get(self.url + "/metrics") as response:
            return await response.text()

    async def run(self, clients: int) -> None:
        timeout = aiohttp.ClientTimeout(120)
        async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
            helpers = (self.storms(session), self.sleeps(session), self.look(session))
            await asyncio.gather(*helpers, *(self.client(session) for _ in range(clients)))
            for _ in range(100):
                held = _held(await self.metrics(session))
                if not any(held.values()):
                    break
                await asyncio.sleep(0.1)
            else:
                self.seen.faults.append(f"with nobody there it holds {held}")
        await asyncio.sleep(1.0)
        self.seen.rows.append(self.row(0))

    def verdict(self, most_growth_mb: float) -> list[str]:
        warm = [row for row in self.seen.rows if row[0] > self.seconds / 5] or self.seen.rows
        quarter = max(1, len(warm) // 4)
        # The most of each: asleep it has less, and for a while after it.
        first, last = (max(row[1] for row in rows) for rows in (warm[:quarter], warm[-quarter:]))
        growth = (last - first) / 1e6
        files = self.seen.rows[-1][2] - self.seen.rows[0][2]
        print(
            f"resident memory after the warm-up: {growth:+.1f} MB; open files at the end against the start: {files:+d}"
        )
        faults = list(dict.fromkeys(self.seen.faults))
        if growth > most_growth_mb:
            faults.append(f"resident memory grew by {growth:.1f} MB")
        if files > 2:
            faults.append(f"{files} files were not closed")
        return faults


def plot(rows: list[Row], path: Path) -> None:
    """Left out where matplotlib, a development dependency, is not installed."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = ("resident MB", "open files", "requests running", "pages in use", "TTFT ms", "loop late by ms")
    figure, axes = plt.subplots(len(names), 1, sharex=True, figsize=(8, 11))
    for place, (name, axis) in enumerate(zip(names, axes, strict=True), 1):
        scale = 1e6 if place == 1 else 1
        axis.plot([row[0] for row in rows], [row[place] / scale for row in rows], linewidth=0.8)
        axis.set_ylabel(name)
    axes[-1].set_xlabel("seconds")
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--most-growth-mb", type=float, default=8.0)
    parser.add_argument("--seed", type=int, default=1)
    flags = "--device cpu --check-invariants --num-gpu-blocks-override 1024 --response-store-size 100"
    flags += f" --weights-root {_MODEL}"
    parser.add_argument("--flags", default=flags, help="of the server")
    parser.add_argument("--plot", type=Path, default=Path("soak.png"))
    arguments = parser.parse_args()
    with running(arguments.flags) as server:
        soak = Soak(f"http://127.0.0.1:{server.port}", server.process.pid, 60 * arguments.minutes, arguments.seed)
        asyncio.run(soak.run(arguments.clients))
        print(", ".join(f"{name}: {count}" for name, count in soak.seen.outcomes.most_common()))
        faults = soak.verdict(arguments.most_growth_mb)
    plot(soak.seen.rows, arguments.plot)
    for fault in faults[:20]:
        print(f"FAILED {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

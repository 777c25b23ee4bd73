"""LiveFeed: what /live shows, as one stream of snapshots for all who look. Nothing is done while nobody does.

One task on the loop takes them: numbers and the last steps four times a second, pages and the radix tree as often as
one percent of the time allows. Who reads too slowly misses snapshots, and costs no memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import asdict
from typing import Any

import orjson

from engine.engine import Engine
from engine.inspection import PAGE_STATES, Tree
from engine.recorder import Step, now, percentiles
from server.accounts import KINDS, Accounts
from server.protocol.errors import ApiError
from server.response_store import ResponseStore

logger = logging.getLogger("oneloop.live")

MAX_VIEWERS = 16
INTERVAL_S = 0.25
PICTURE_INTERVAL_S = 1.0
# Of the time that taking them may cost: of the numbers, and of the pictures as well.
SHARE = 0.004
_LAG_EVERY_S = 0.02
_MAX_LAGS = 512
# More than one step has, mostly; those of a burst of short prompts are summed up by the counts beside them.
_MAX_CHUNKS = 8

Json = dict[str, Any]


class LiveFeed:
    """`snapshots` are bytes of JSON. show_text: of prompts, in the tree."""

    def __init__(self, engine: Engine, accounts: Accounts, responses: ResponseStore, *, show_text: bool) -> None:
        self._engine = engine
        self._accounts = accounts
        self._responses = responses
        self._show_text = show_text and engine.tokenizer is not None
        self._num_viewers = 0
        self._task: asyncio.Task[None] | None = None
        self._latest = b""
        self._changed: asyncio.Event = asyncio.Event()
        self._lags: deque[float] = deque(maxlen=_MAX_LAGS)
        self._lag_timer: asyncio.TimerHandle | None = None
        self._counts = (0.0, 0, 0, 0, 0)
        self._last_step = -1
        self._picture_at = 0.0
        self._asked: asyncio.Event = asyncio.Event()

    async def snapshots(self) -> AsyncGenerator[bytes, None]:
        """From now on, the newest each time. Raises ApiError where too many look."""
        if self._num_viewers >= MAX_VIEWERS:
            raise ApiError(429, f"{MAX_VIEWERS} pages look at this server already.")
        self._num_viewers += 1
        if self._num_viewers == 1:
            self._begin()
        # Who comes sees all of it at once.
        self._picture_at = 0.0
        self._asked.set()
        try:
            while True:
                changed = self._changed
                await changed.wait()
                if self._task is None or self._task.done():
                    return  # it failed; a page that asks again begins it anew
                yield self._latest
        finally:
            self._num_viewers -= 1
            if not self._num_viewers:
                self._end()

    def _begin(self) -> None:
        self._engine.recorder.watch()
        self._counts = self._count()
        self._task = asyncio.create_task(self._run(), name="live-feed")
        self._task.add_done_callback(self._failed)
        self._watch_lag(None)

    def _failed(self, task: asyncio.Task[None]) -> None:
        """A snapshot could not be made: said once, and nobody waits for the next."""
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("what /live shows cannot be gathered", exc_info=error)
            self._publish(self._latest)

    def _end(self) -> None:
        self._engine.recorder.unwatch()
        if self._task is not None:
            self._task.cancel()
        if self._lag_timer is not None:
            self._lag_timer.cancel()
        self._task = self._lag_timer = None
        self._lags.clear()

    def _watch_lag(self, due: float | None) -> None:
        """How late the loop calls what is due."""
        loop = asyncio.get_running_loop()
        if due is not None:
            self._lags.append(max(0.0, loop.time() - due))
        due = loop.time() + _LAG_EVERY_S
        self._lag_timer = loop.call_at(due, self._watch_lag, due)

    async def _run(self) -> None:
        engine = self._engine
        engine.recorder.look()
        while True:
            # Of the thread's own time: a busy machine takes the rest.
            began = time.thread_time()
            snapshot = self._numbers()
            spent = time.thread_time() - began
            if now() >= self._picture_at:
                before = engine.inspection.seconds_spent
                pool, tree = await engine.inspection.pool(), await engine.inspection.tree()
                snapshot["pool"] = asdict(pool)
                snapshot["tree"] = self._tree(tree)
                snapshot["memory"] = self._memory(pool.counts)
                took = engine.inspection.seconds_spent - before
                self._picture_at = now() + max(PICTURE_INTERVAL_S, took / SHARE)
                snapshot["picture_ms"] = round(took * 1e3, 3)
            began = time.thread_time()
            self._publish(orjson.dumps(snapshot))
            engine.recorder.look()
            spent += time.thread_time() - began
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._asked.wait(), max(INTERVAL_S, spent / SHARE))
            self._asked.clear()

    def _publish(self, data: bytes) -> None:
        self._latest = data
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    # ---- what is in a snapshot

    def _numbers(self) -> Json:
        engine, at = self._engine, now()
        recorder, clock = engine.recorder, engine.clock.now()
        steps = [step for step in recorder.steps if step.number > self._last_step]
        if steps:
            self._last_step = steps[-1].number
        running, num_running = engine.inspection.running(clock)
        waiting, num_waiting = engine.inspection.waiting(clock)
        counts, before = self._count(), self._counts
        self._counts = counts
        seconds = max(1e-9, counts[0] - before[0])
        output, prompt, num_steps, finished = (
            round((new - old) / seconds, 2) for new, old in zip(counts[1:], before[1:], strict=True)
        )
        accounts = self._accounts
        return {
            "at": time.time(),
            "clock": at,
            "state": self._state(),
            "steps": [_step(step) for step in steps],
            "running": [asdict(row) for row in running],
            "num_running": num_running,
            "waiting": [asdict(row) for row in waiting],
            "num_waiting": num_waiting,
            "rates": {"output": output, "prompt": prompt, "steps": num_steps, "requests": finished},
            "ttft": percentiles(recorder.first_tokens),
            "itl": percentiles(recorder.inter_token()),
            "lag": percentiles(self._lags, (50.0, 99.0, 100.0)),
            "limits": {
                "sequences": engine.limits.max_num_seqs,
                "tokens": engine.limits.max_num_batched_tokens,
                "pages": engine.limits.num_pages,
                "page_size": engine.limits.page_size,
                "depth": engine.depth,
            },
            "accounts": [
                {"key": key, **dict(zip(KINDS, used, strict=True)), "cost": accounts.cost(key)}
                for key, used in sorted(accounts.tokens.items(), key=lambda item: -sum(item[1]))[:32]
            ],
            "currency": None if accounts.prices is None else accounts.prices.currency,
        }

    def _state(self) -> str:
        engine = self._engine
        if engine.failed:
            return "failed"
        if engine.draining:
            return "draining"
        if engine.sleep_level:
            return "asleep"
        return "paused" if engine.is_paused else "serving"

    def _count(self) -> tuple[float, int, int, int, int]:
        """Now, and running totals: generated tokens, computed prompt tokens, steps, ended requests."""
        metrics, counters = self._engine.metrics, self._engine.scheduler.counters
        return (
            now(),
            metrics.generation_tokens,
            counters.prefill_tokens,
            metrics.num_steps,
            sum(metrics.finished.values()),
        )

    def _tree(self, tree: Tree) -> Json:
        tokenizer = self._engine.tokenizer
        nodes = []
        for node in tree.nodes:
            one = asdict(node)
            tokens = one.pop("tokens")
            if self._show_text and tokenizer is not None:
                one["text"] = tokenizer.decode(tokens, skip_special_tokens=False)
            nodes.append(one)
        return {
            "nodes": nodes,
            "namespaces": tree.num_namespaces,
            "seen": tree.num_seen,
            "is_whole": tree.is_whole,
        }

    def _memory(self, counts: dict[str, int]) -> list[tuple[str, int]]:
        """Bytes by owner, as far as they are known: what steps run on first, then what the process keeps beside it."""
        engine = self._engine
        held = getattr(engine.executor, "held_bytes", None)
        owners: list[tuple[str, int]] = [] if held is None else list(held().items())
        if page_bytes := getattr(engine.executor, "page_bytes", 0):
            owners += [(f"KV pages: {state}", counts[state] * page_bytes) for state in PAGE_STATES]
        if engine.tier is not None and (host := engine.tier.worker.host) is not None:
            owners.append(("KV pages in host memory", host.num_bytes))
        if engine.adapters is not None:
            resident = [entry.num_bytes for entry in engine.adapters.entries if entry.adapter is not None]
            owners.append(("adapters", sum(resident)))
        if self._responses.num_bytes:
            owners.append(("kept responses", self._responses.num_bytes))
        if (used := _resident_bytes()) is not None:
            owners.append(("process (resident)", used))
        return owners


def _step(step: Step) -> list[object]:
    """In the order of web/live_charts.js (readStep). Times in milliseconds of the feed's clock."""
    return [
        step.number,
        *(round(at * 1e3, 4) for at in step[1:10]),
        step.is_told,
        *step[11:18],
        step.failed,
        [[chunk.request_id, chunk.kind, chunk.start, chunk.end] for chunk in step.chunks[:_MAX_CHUNKS]],
    ]


def _resident_bytes() -> int | None:
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None

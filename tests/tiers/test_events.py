"""What a subscriber of KV events learns of host memory and the disk is what they hold, by vLLM's names for them."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from engine.engine import Engine
from server.kv_events import BlockNames
from tests.tiers.test_tier import FILES, PAGE, PROMPT, ask, asked, running, settled


class Subscriber:
    """A CacheWatch and a TierWatch: by medium the hashes that it was told of, and what has tokens."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._names, self._lock = BlockNames(page_size), threading.Lock()
        self.held: defaultdict[str, set[int]] = defaultdict(set)
        self.tokens: dict[int, list[int]] = {}

    def _apply(self, events: list[dict[str, Any]]) -> None:
        for event in events:
            hashes = event.get("block_hashes", [])
            if event["type"] == "AllBlocksCleared":
                self.held.clear()
            elif event["type"] == "BlockRemoved":
                assert self.held[event["medium"]].issuperset(hashes), "what goes was never there"
                self.held[event["medium"]].difference_update(hashes)
            else:
                assert not self.held[event["medium"]].intersection(hashes), "told of twice"
                self.held[event["medium"]].update(hashes)
                assert event["block_size"] == self._page_size
                if event["medium"] == "GPU":
                    for number, name in enumerate(hashes):
                        self.tokens[name] = event["token_ids"][number * self._page_size :][: self._page_size]
                else:
                    assert event["token_ids"] == [] and event["parent_block_hash"] is None and len(hashes) == 1

    def stored(self, namespace: str, data: bytes, first: int, pages: Sequence[int], before: int) -> None:
        with self._lock:
            self._apply(self._names.stored(namespace, data, first, pages, before))

    def freed(self, pages: Sequence[int]) -> None:
        with self._lock:
            self._apply(self._names.freed(pages))

    def cleared(self) -> None:
        with self._lock:
            self._apply(self._names.cleared())

    def named(self, namespace: str, data: bytes, names: Sequence[bytes]) -> None:
        with self._lock:
            self._apply(self._names.named(namespace, data, names))

    def came(self, medium: str, name: bytes) -> None:
        with self._lock:
            self._apply(self._names.came(medium, name))

    def went(self, medium: str, name: bytes) -> None:
        with self._lock:
            self._apply(self._names.went(medium, name))


def subscribe(engine: Engine) -> Subscriber:
    subscriber = Subscriber(engine.limits.page_size)
    engine.scheduler.kv_cache.watch(subscriber)
    assert engine.tier is not None
    engine.tier.watch(subscriber)
    return subscriber


async def test_what_goes_to_the_disk_is_told_of(tmp_path: Path) -> None:
    """And what leaves it for others, and what a restarted server finds there as it reads it."""
    async with running(tmp_path) as engine:
        subscriber = subscribe(engine)
        await asked(engine, ask())
        await settled(engine)
        assert subscriber.held["STORAGE"] == subscriber.held["GPU"] and len(subscriber.held["GPU"]) == FILES
        assert sorted(subscriber.tokens[name] for name in subscriber.held["STORAGE"]) == sorted(
            PROMPT[start : start + PAGE] for start in range(0, FILES * PAGE, PAGE)
        )
        assert set(subscriber.held) == {"GPU", "STORAGE"}
        size = engine.tier.worker.disk.bytes if engine.tier is not None and engine.tier.worker.disk is not None else 0
    async with running(tmp_path, max_bytes=size) as engine:
        subscriber = subscribe(engine)
        assert await asked(engine, ask()) == FILES * PAGE
        assert subscriber.held["STORAGE"] == subscriber.held["GPU"] and len(subscriber.held["GPU"]) == FILES
        first = set(subscriber.held["STORAGE"])
        # There is room for no other: each that comes takes some away.
        other = [*PROMPT[:32], *range(300)]
        await asked(engine, ask(other, "b"), other)
        await settled(engine)
        assert engine.tier is not None and len(engine.tier.store) == len(subscriber.held["STORAGE"])
        assert first - subscriber.held["STORAGE"] and subscriber.held["STORAGE"] - first


async def test_after_a_flush_it_is_told_anew(tmp_path: Path) -> None:
    """Whoever has heard that all is gone hears of what is used again."""
    async with running(tmp_path) as engine:
        subscriber = subscribe(engine)
        await asked(engine, ask())
        await settled(engine)
        held = set(subscriber.held["STORAGE"])
        assert engine.flush_cache() and not subscriber.held
        assert await asked(engine, ask(name="b")) == FILES * PAGE
        assert subscriber.held["STORAGE"] == held == subscriber.held["GPU"]


def damage(directory: Path) -> None:
    path = sorted(directory.glob("*/*.page"))[0]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


async def test_a_damaged_file_is_gone(tmp_path: Path) -> None:
    async with running(tmp_path) as engine:
        subscriber = subscribe(engine)
        await asked(engine, ask())
        await settled(engine)
        engine.flush_cache()
        damage(tmp_path)
        await asked(engine, ask(name="b"))
        await settled(engine)
        # It was computed, and written anew.
        assert len(subscriber.held["GPU"]) == FILES
        assert subscriber.held["STORAGE"] <= subscriber.held["GPU"]


def test_what_nobody_has_named_is_not_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    names = BlockNames(PAGE)
    assert names.came("CPU", b"x" * 32) == [] == names.went("CPU", b"x" * 32)
    names.named("", bytes(4 * PAGE), [b"x" * 32])
    (event,) = names.came("CPU", b"x" * 32)
    assert event["type"] == "BlockStored" and event["medium"] == "CPU" and names.came("CPU", b"x" * 32) == []
    assert names.went("CPU", b"x" * 32) == [
        {"type": "BlockRemoved", "block_hashes": event["block_hashes"], "medium": "CPU"}
    ]
    assert names.stored("", bytes(4 * PAGE), 0, [1], 0)[0]["block_hashes"] == event["block_hashes"]
    monkeypatch.setattr("server.kv_events._MOST_NAMES", 1)
    names.named("", bytes(8 * PAGE), [b"y" * 32, b"z" * 32])
    assert names.came("CPU", b"y" * 32) == [] and names.came("CPU", b"z" * 32)

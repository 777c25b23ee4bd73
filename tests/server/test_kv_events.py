"""What a subscriber learns of the KV cache is what the cache holds, by the real wire."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.cache.kv_cache import KVCache, _to_bytes
from engine.config import StartupError, TierOptions
from server.kv_events import BlockNames, KVEventOptions, KVEvents, parse
from tests.server.support import BOUND_S, Live, live

zmq = pytest.importorskip("zmq")
zmq_asyncio = pytest.importorskip("zmq.asyncio")
msgpack = pytest.importorskip("msgpack")

PAGE = 16


class Index:
    """What a router keeps: who is the parent of which block, and its tokens."""

    def __init__(self) -> None:
        self.blocks: dict[int, tuple[int | None, tuple[int, ...], str | None]] = {}
        self.cleared = 0
        self.kept: defaultdict[str, set[int]] = defaultdict(set)  # by medium, beside the device

    def apply(self, event: dict[str, Any]) -> None:
        kind = event["type"]
        if kind == "AllBlocksCleared":
            self.blocks.clear()
            self.kept.clear()
            self.cleared += 1
        elif event["medium"] != "GPU":
            assert kind == "BlockRemoved" or event["token_ids"] == [], "the tokens are those of the device's event"
            kept, names = self.kept[event["medium"]], set(event["block_hashes"])
            assert names <= kept if kind == "BlockRemoved" else not names & kept
            kept ^= names
        elif kind == "BlockRemoved":
            for name in event["block_hashes"]:
                del self.blocks[name]
        else:
            assert kind == "BlockStored" and event["block_size"] == PAGE and event["medium"] == "GPU"
            parent, tokens = event["parent_block_hash"], event["token_ids"]
            assert len(tokens) == PAGE * len(event["block_hashes"])
            extra = event.get("extra_keys") or [None] * len(event["block_hashes"])
            for number, name in enumerate(event["block_hashes"]):
                assert name not in self.blocks and 0 <= name < 2**64
                salt = extra[number][0] if extra[number] else None
                self.blocks[name] = parent, tuple(tokens[number * PAGE : (number + 1) * PAGE]), salt
                parent = name

    def prefixes(self) -> set[tuple[int, ...]]:
        def whole(name: int) -> tuple[int, ...]:
            parent, tokens, _ = self.blocks[name]
            return (whole(parent) if parent is not None else ()) + tokens

        return {whole(name) for name in self.blocks}

    def cached(self, prompt: list[int]) -> int:
        """Tokens of a prompt without a salt that the server has, as one who only knows the events would say."""
        parent: int | None = None
        for start in range(0, (len(prompt) - 1) // PAGE * PAGE, PAGE):
            wanted = parent, tuple(prompt[start : start + PAGE]), None
            found = [name for name, block in self.blocks.items() if block == wanted]
            if not found:
                return start
            parent = found[0]
        return (len(prompt) - 1) // PAGE * PAGE


class Subscriber:
    def __init__(self, socket: Any, topic: bytes) -> None:
        self.socket, self.topic, self.index, self.numbers = socket, topic, Index(), list[int]()

    async def receive(self) -> None:
        """One message."""
        topic, number, payload = await asyncio.wait_for(self.socket.recv_multipart(), BOUND_S)
        _time, events, rank = msgpack.unpackb(payload)
        assert topic == self.topic and rank == 0
        self.numbers.append(int.from_bytes(number, "big"))
        for event in events:
            self.index.apply(event)

    async def until(self, pages: int) -> None:
        """So many pages are cached."""
        while len(self.index.blocks) != pages:
            await self.receive()

    async def until_equal(self, cache: KVCache) -> None:
        """What it knows is what stands in the tree, page for page."""
        wanted = held(cache)
        while self.index.prefixes() != wanted:
            await self.receive()


def held(cache: KVCache) -> set[tuple[int, ...]]:
    """The prefixes that end where a page of the common tree does."""
    prefixes = set()
    ways = [(child, ()) for root in cache.roots() for child in root.children.values()]
    while ways:
        node, before = ways.pop()
        tokens = np.frombuffer(node.tokens, np.int32)[: node.length * PAGE].tolist()
        prefixes |= {(*before, *tokens[:end]) for end in range(PAGE, len(tokens) + 1, PAGE)}
        ways += [(child, (*before, *tokens)) for child in node.children.values()]
    return prefixes


@asynccontextmanager
async def subscribed(tmp_path: Path, **options: Any) -> AsyncIterator[tuple[Live, Subscriber, str]]:
    endpoint, replay = f"ipc://{tmp_path}/events", f"ipc://{tmp_path}/replay"
    config = {"enable_kv_cache_events": True, "endpoint": endpoint, "replay_endpoint": replay, "topic": "kv"}
    context = zmq_asyncio.Context()
    socket = context.socket(zmq.SUB)
    socket.setsockopt(zmq.SUBSCRIBE, b"kv")
    try:
        async with live(kv_events=config, **options) as server:
            socket.connect(endpoint)
            subscriber = Subscriber(socket, b"kv")
            # A subscription takes a moment; what is published before is lost. So something is, until it is seen.
            while not await socket.poll(20):
                server.engine.scheduler.kv_cache.flush()
            await subscriber.receive()
            while await socket.poll(50):
                await subscriber.receive()
            yield server, subscriber, replay
    finally:
        context.destroy(linger=0)


async def test_a_subscriber_knows_what_is_cached(tmp_path: Path) -> None:
    """With a pool that is much too small, so that pages come and go."""
    rng = random.Random(7)
    async with subscribed(tmp_path, num_pages=40, max_num_seqs=4) as (server, subscriber, _):
        roots = [[rng.randrange(10, 400) for _ in range(40)] for _ in range(4)]
        cache = server.engine.scheduler.kv_cache
        hits = 0
        for number in range(40):
            prompt = rng.choice(roots)[: rng.randrange(20, 41)] + [
                rng.randrange(10, 400) for _ in range(rng.randrange(60))
            ]
            await server.all_free()
            await subscriber.until_equal(cache)
            expected = subscriber.index.cached(prompt)
            answer = await server.complete(prompt, max_tokens=rng.randrange(1, 30), return_token_ids=True)
            assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == expected, number
            hits += expected > 0
        await server.all_free()
        await subscriber.until_equal(cache)
        assert hits > 5 and cache.num_evicted_pages > 50
        assert subscriber.numbers == list(range(subscriber.numbers[0], subscriber.numbers[0] + len(subscriber.numbers)))
        assert server.engine.flush_cache()
        await subscriber.until(0)


async def test_a_salt_is_told_apart_and_not_told(tmp_path: Path) -> None:
    async with subscribed(tmp_path) as (server, subscriber, _):
        prompt = list(range(10, 60))
        await server.complete(prompt, max_tokens=1)
        await server.complete(prompt, max_tokens=1, cache_salt="pepper")
        await subscriber.until(6)
        salts = {salt for parent, _, salt in subscriber.index.blocks.values() if parent is None}
        assert len(salts) == 2 and None in salts and not any("pepper" in (salt or "") for salt in salts)
        assert subscriber.index.cached(prompt) == 48


async def test_what_was_missed_is_replayed(tmp_path: Path) -> None:
    async with subscribed(tmp_path) as (server, subscriber, replay):
        await server.complete(list(range(10, 60)), max_tokens=1)
        await subscriber.until(3)
        first = subscriber.numbers[0]
        again, numbers = Index(), []
        context = zmq_asyncio.Context()
        try:
            asker = context.socket(zmq.DEALER)
            asker.connect(replay)
            await asker.send_multipart([b"", b"what?"])  # not understood, and nobody is hurt
            await asker.send_multipart([b"", first.to_bytes(8, "big")])
            while True:
                empty, topic, number, payload = await asyncio.wait_for(asker.recv_multipart(), BOUND_S)
                assert empty == b"" and topic == b"kv"
                if int.from_bytes(number, "big", signed=True) == -1:
                    break
                numbers.append(int.from_bytes(number, "big"))
                for event in msgpack.unpackb(payload)[1]:
                    again.apply(event)
        finally:
            context.destroy(linger=0)
        assert numbers == subscriber.numbers and again.blocks == subscriber.index.blocks


async def test_routes_say_where_events_are(tmp_path: Path) -> None:
    async with subscribed(tmp_path) as (server, _, replay):
        async with server.http.get(server.url + "/kv_event_sources") as response:
            assert await response.json() == [
                {
                    "data_parallel_rank": 0,
                    "endpoint": f"ipc://{tmp_path}/events",
                    "replay_endpoint": replay,
                    "topic": "kv",
                }
            ]
        async with server.http.get(server.url + "/server_info") as response:
            told = (await response.json())["kv_events"]
        assert told == {"publisher": "zmq", "topic": "kv", "block_size": PAGE, "dp_size": 1}


async def test_what_is_on_the_disk_is_told_of(tmp_path: Path) -> None:
    """Over the wire, beside the device's; and how much it is stands in /server_info."""
    tiers = TierOptions(tmp_path / "kv", 10**8, 5.0)
    async with subscribed(tmp_path, tiers=tiers) as (server, subscriber, _):
        prompt = list(range(10, 10 + 200))
        await server.complete(prompt, max_tokens=1)
        while len(subscriber.index.kept["STORAGE"]) < 12:
            await subscriber.receive()
        assert subscriber.index.kept["STORAGE"] == subscriber.index.blocks.keys()
        async with server.http.get(server.url + "/server_info") as response:
            told = (await response.json())["kv_tiers"]
        disk = told["disk"]
        assert disk["files"] == 12 and 0 < disk["bytes"] < disk["max_bytes"] == 10**8 and disk["medium"] == "STORAGE"
        assert told["queried_tokens"] == 200 and told["hit_tokens"] == 0 and not told["failures"]
        assert "host" not in told and str(tmp_path) not in str(told)


async def test_without_events_there_are_no_sources(server: Live) -> None:
    async with server.http.get(server.url + "/kv_event_sources") as response:
        assert await response.json() == []
    async with server.http.get(server.url + "/server_info") as response:
        assert "kv_events" not in await response.json()


def test_a_failed_step_is_not_told_of() -> None:
    """What was entered for it is taken back before anybody hears of it."""
    told: list[tuple[Any, ...]] = []

    class Watch:
        def stored(self, *given: Any) -> None:
            told.append(("stored", *given))

        def freed(self, pages: Any) -> None:
            told.append(("freed", list(pages)))

        def cleared(self) -> None:
            told.append(("cleared",))

    cache = KVCache(16, PAGE)
    cache.watch(Watch())
    tokens = list(range(64))
    pages = cache.begin(tokens)
    assert cache.reserve(pages, 64)
    cache.enter(pages, tokens, 64)
    assert told == []
    cache.take_back(pages, 0)
    cache.confirm(pages, 0, 4)
    cache.release(pages, tokens, 0)
    assert [kind for kind, *_ in told] == ["freed"] * len(told)


def test_names_do_not_depend_on_what_was_told_before() -> None:
    tokens = list(range(80))
    data = _to_bytes(tokens)
    whole = BlockNames(PAGE).stored("", data, 0, [1, 2, 3, 4, 5], 0)
    assert len(whole) == 1 and whole[0]["parent_block_hash"] is None and whole[0]["token_ids"] == tokens
    late = BlockNames(PAGE)  # has never heard of what is before
    (end,) = late.stored("", data, 3, [4, 5], 3)
    assert end["block_hashes"] == whole[0]["block_hashes"][3:]
    assert end["parent_block_hash"] == whole[0]["block_hashes"][2] and end["token_ids"] == tokens[48:]
    # Told of once; null pages never.
    both = late.stored("", data, 0, [1, 0, 3, 4, 5], 0)
    assert [event["block_hashes"] for event in both] == [[whole[0]["block_hashes"][0]], [whole[0]["block_hashes"][2]]]
    assert late.freed([9, 3]) == [
        {"type": "BlockRemoved", "block_hashes": [whole[0]["block_hashes"][2]], "medium": "GPU"}
    ]
    other = BlockNames(PAGE).stored("tenant", data, 0, [1], 0)[0]
    assert other["block_hashes"][0] != whole[0]["block_hashes"][0] and "tenant" not in str(other)


def test_a_thread_that_falls_behind_begins_anew(tmp_path: Path) -> None:
    options = KVEventOptions(endpoint=f"ipc://{tmp_path}/events", max_queue_size=2)
    events = KVEvents(options, PAGE)
    try:
        for number in range(20_000):
            events.freed([number + 1])
        events.cleared()
    finally:
        events.close()
    assert events.num_dropped > 0
    assert b"AllBlocksCleared" in events._sent[-1][1]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"enable": True}, "unknown key 'enable'"),
        ({"enable_kv_cache_events": 1}, "must be bool"),
        ({"enable_kv_cache_events": True, "endpoint": "5557"}, "tcp://HOST:PORT"),
        ({"enable_kv_cache_events": True, "buffer_steps": 0}, "positive"),
        ({"enable_kv_cache_events": True, "buffer_steps": True}, "must be int"),
        ({"enable_kv_cache_events": True, "publisher": "kafka"}, "zmq or null"),
    ],
)
def test_what_is_not_understood_ends_the_start(given: dict[str, Any], words: str) -> None:
    with pytest.raises(StartupError, match=words) as raised:
        parse(given)
    assert "\n" not in str(raised.value)


def test_what_switches_nothing_on() -> None:
    assert parse({}) is None and parse({"enable_kv_cache_events": True, "publisher": "null"}) is None
    assert parse({"enable_kv_cache_events": True}) == KVEventOptions()


def test_an_address_that_is_taken(tmp_path: Path) -> None:
    first = KVEvents(KVEventOptions(endpoint="tcp://127.0.0.1:*"[:-1] + "0"), PAGE)
    try:
        port = first._publisher.getsockopt_string(zmq.LAST_ENDPOINT)
        with pytest.raises(StartupError, match="cannot listen"):
            KVEvents(KVEventOptions(endpoint=port), PAGE)
    finally:
        first.close()

"""KV events: what the radix tree gains and loses, published over ZeroMQ in the form that vLLM's subscribers read.

`--kv-events-config` (vLLM's JSON); needs the extra [kv-events]. Routers that know which server has which prefix (llm-d,
NVIDIA Dynamo, Ray) subscribe. The loop only queues what it has seen; a thread names pages by a chain of hashes, packs
and sends. A block is a page: its hash is the last 64 bits of a SHA-256 chain over the tokens, begun by the namespace.
"""

from __future__ import annotations

import logging
import queue
import re
import socket
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from engine.config import StartupError
from engine.forward import NULL_PAGE
from engine.page_names import page_names, root_name

logger = logging.getLogger("oneloop.kv_events")

FLAG = "--kv-events-config"
_ENDPOINT = re.compile(r"(tcp://(\*|[^\s:/*]+):\d{1,5}|(ipc|inproc)://\S+)")
# Batches that one message holds at most.
_MOST_AT_ONCE = 1024
# Names of tiers' pages of which nothing has been told yet; the oldest are forgotten.
_MOST_NAMES = 2**17
_END_OF_REPLAY = (-1).to_bytes(8, "big", signed=True)


@dataclass(frozen=True, slots=True)
class KVEventOptions:
    """vLLM's KVEventsConfig. endpoint: where subscribers connect to; `*` is every interface. replay_endpoint: where
    they ask for the last buffer_steps messages again, None for nowhere. hwm: messages that a slow subscriber may be
    behind. max_queue_size: what may wait for the thread."""

    enable_kv_cache_events: bool = True
    publisher: str = "zmq"
    endpoint: str = "tcp://*:5557"
    replay_endpoint: str | None = None
    buffer_steps: int = 10_000
    hwm: int = 100_000
    max_queue_size: int = 100_000
    topic: str = ""


def parse(given: Mapping[str, Any]) -> KVEventOptions | None:
    """None where it switches the events off. Raises StartupError for what is not understood."""
    kinds = {field.name: str if field.default is None else type(field.default) for field in fields(KVEventOptions)}
    for name, value in given.items():
        if name not in kinds:
            raise StartupError(f"{FLAG}: unknown key {name!r}; known are {', '.join(kinds)}")
        if name == "replay_endpoint" and value is None:
            continue
        wanted = kinds[name]
        if type(value) is not wanted:
            raise StartupError(f"{FLAG}: {name} must be {wanted.__name__}, not {value!r}")
        if isinstance(value, int) and wanted is int and not 0 < value < 2**31:
            raise StartupError(f"{FLAG}: {name} must be a positive number, not {value}")
        if "endpoint" in name and not _ENDPOINT.fullmatch(str(value)):
            raise StartupError(f"{FLAG}: {name} must be tcp://HOST:PORT or ipc://PATH, not {value!r}")
    # As vLLM has it: a config that does not say so switches nothing on, and what is on is published.
    enabled = given.get("enable_kv_cache_events", False)
    publisher = given.get("publisher", "zmq" if enabled else "null")
    if publisher not in ("zmq", "null"):
        raise StartupError(f"{FLAG}: publisher must be zmq or null, not {publisher!r}")
    if not enabled or publisher == "null":
        return None
    return KVEventOptions(**given)


def check() -> None:
    """Raises StartupError without the packages."""
    try:
        import msgpack  # noqa: F401
        import zmq  # noqa: F401
    except ImportError as error:
        raise StartupError(f"{FLAG} needs {error.name}: pip install 'oneloop[kv-events]'") from None


class BlockNames:
    """Pages to hashes, and back to events. Used by the publisher's thread alone."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._page_bytes = page_size * 4  # int32
        self._digests: dict[int, bytes] = {}  # of pages that were told of
        # Of what is kept beside the cache: hashes by name, and what was told of by medium and name.
        self._named: OrderedDict[bytes, int] = OrderedDict()
        self._kept: dict[tuple[str, bytes], int] = {}

    def stored(
        self, namespace: str, data: bytes, first: int, pages: Sequence[int], before: int
    ) -> list[dict[str, Any]]:
        """Events of the pages that are new. before: the id of the page before the first, the null page for none."""
        root = root_name("kv events", namespace)
        parent = grandparent = root
        if first:
            parent = self._digests.get(before) or page_names(root, data, self._page_size, 0, first)[-1]
        events: list[dict[str, Any]] = []
        hashes: list[int] = []
        begin = first
        names = page_names(parent, data, self._page_size, first, first + len(pages))
        for index, (page, name) in enumerate(zip(pages, names, strict=True), first):
            if page == NULL_PAGE or page in self._digests:
                if hashes:
                    events.append(self._event(namespace, data, begin, hashes, grandparent, root))
                hashes = []
            else:
                if not hashes:
                    begin, grandparent = index, parent
                self._digests[page] = name
                hashes.append(_hash(name))
            parent = name
        if hashes:
            events.append(self._event(namespace, data, begin, hashes, grandparent, root))
        return events

    def freed(self, pages: Sequence[int]) -> list[dict[str, Any]]:
        gone = [digest for page in pages if (digest := self._digests.pop(page, None)) is not None]
        if not gone:
            return []
        return [{"type": "BlockRemoved", "block_hashes": [_hash(digest) for digest in gone], "medium": "GPU"}]

    def cleared(self) -> list[dict[str, Any]]:
        self._digests.clear()
        self._kept.clear()
        return [{"type": "AllBlocksCleared"}]

    def named(self, namespace: str, data: bytes, names: Sequence[bytes]) -> list[dict[str, Any]]:
        """See TierWatch."""
        root = root_name("kv events", namespace)
        for name, digest in zip(names, page_names(root, data, self._page_size, 0, len(names)), strict=True):
            self._named[name] = _hash(digest)
            self._named.move_to_end(name)
        while len(self._named) > _MOST_NAMES:
            self._named.popitem(last=False)
        return []

    def came(self, medium: str, name: bytes) -> list[dict[str, Any]]:
        """As vLLM tells of what it has offloaded: by the hash alone, whose tokens are those of the GPU's event."""
        known = self._named.get(name)
        if known is None or (medium, name) in self._kept:
            return []
        self._kept[medium, name] = known
        return [
            {
                "type": "BlockStored",
                "block_hashes": [known],
                "parent_block_hash": None,
                "token_ids": [],
                "block_size": self._page_size,
                "lora_id": None,
                "medium": medium,
                "lora_name": None,
            }
        ]

    def went(self, medium: str, name: bytes) -> list[dict[str, Any]]:
        """See TierWatch."""
        known = self._kept.pop((medium, name), None)
        return [] if known is None else [{"type": "BlockRemoved", "block_hashes": [known], "medium": medium}]

    def _event(
        self, namespace: str, data: bytes, first: int, hashes: list[int], parent: bytes, root: bytes
    ) -> dict[str, Any]:
        tokens = memoryview(data)[first * self._page_bytes : (first + len(hashes)) * self._page_bytes].cast("i")
        event: dict[str, Any] = {
            "type": "BlockStored",
            "block_hashes": hashes,
            "parent_block_hash": None if parent == root else _hash(parent),
            "token_ids": tokens.tolist(),
            "block_size": self._page_size,
            "lora_id": None,
            # The tier that the model reads from, whatever the device: consumers know GPU, CPU and STORAGE.
            "medium": "GPU",
            "lora_name": None,
        }
        if namespace:
            # Whose it is need not be known, only that it is not everybody's.
            event["extra_keys"] = [
                [root.hex()[:16]] if index == 0 else None for index in range(first, first + len(hashes))
            ]
        return event


def _hash(digest: bytes) -> int:
    return int.from_bytes(digest[-8:], "big")


class KVEvents:
    """A CacheWatch and a TierWatch. Raises StartupError where an endpoint cannot be bound. `close` sends what waits."""

    def __init__(self, options: KVEventOptions, page_size: int) -> None:
        check()
        import zmq

        self.options = options
        self.num_dropped = 0
        self._names = BlockNames(page_size)
        self._page_size = page_size
        self._queue: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()
        self._overflowed = False
        self._sequence = 0
        self._sent: deque[tuple[int, bytes]] = deque(maxlen=options.buffer_steps)
        self._lock = threading.Lock()  # of what was sent
        self._context = zmq.Context()
        self._publisher = self._bind(zmq.PUB, options.endpoint)
        self._publisher.set_hwm(options.hwm)
        self._threads = [threading.Thread(target=self._work, name="kv-events", daemon=True)]
        if options.replay_endpoint is not None:
            self._replayer = self._bind(zmq.ROUTER, options.replay_endpoint)
            self._threads.append(threading.Thread(target=self._replay, name="kv-events-replay", daemon=True))
        for thread in self._threads:
            thread.start()

    def _bind(self, kind: int, endpoint: str) -> Any:
        import zmq

        made = self._context.socket(kind)
        made.setsockopt(zmq.LINGER, 1000)
        if "[" in endpoint:
            made.setsockopt(zmq.IPV6, 1)
        try:
            made.bind(endpoint)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise StartupError(f"{FLAG}: cannot listen on {endpoint}: {error}") from None
        return made

    # ---- on the loop

    def stored(self, namespace: str, data: bytes, first: int, pages: Sequence[int], before: int) -> None:
        """See CacheWatch."""
        self._put(("stored", namespace, data, first, list(pages), before))

    def freed(self, pages: Sequence[int]) -> None:
        """See CacheWatch."""
        if pages:
            self._put(("freed", list(pages)))

    def cleared(self) -> None:
        """See CacheWatch."""
        self._put(("cleared",))

    def named(self, namespace: str, data: bytes, names: Sequence[bytes]) -> None:
        """See TierWatch."""
        self._put(("named", namespace, data, list(names)))

    def came(self, medium: str, name: bytes) -> None:
        """See TierWatch. Any thread."""
        self._put(("came", medium, name))

    def went(self, medium: str, name: bytes) -> None:
        """See TierWatch. Any thread."""
        self._put(("went", medium, name))

    def _put(self, item: tuple[Any, ...]) -> None:
        if self._queue.qsize() < self.options.max_queue_size:
            self._queue.put(item)
            return
        self.num_dropped += 1
        if not self._overflowed:
            self._overflowed = True
            logger.warning("%d KV events wait to be sent; what is beyond is dropped", self.options.max_queue_size)

    def sources(self) -> list[dict[str, Any]]:
        """vLLM's answer at /kv_event_sources."""
        replay = self.options.replay_endpoint
        return [
            {
                "data_parallel_rank": 0,
                "endpoint": _reachable(self.options.endpoint),
                "replay_endpoint": None if replay is None else _reachable(replay),
                "topic": self.options.topic,
            }
        ]

    def announced(self) -> dict[str, Any]:
        """SGLang's words in /server_info."""
        told: dict[str, Any] = {
            "publisher": "zmq",
            "topic": self.options.topic,
            "block_size": self._page_size,
            "dp_size": 1,
        }
        if (place := _tcp(self.options.endpoint)) is not None:
            told |= {"endpoint_host": place[0], "endpoint_port_base": place[1]}
        if self.options.replay_endpoint is not None and (place := _tcp(self.options.replay_endpoint)) is not None:
            told["replay_endpoint_port_base"] = place[1]
        return told

    def close(self) -> None:
        """Blocks until what waits has been sent, or for about a second."""
        self._queue.put(None)
        self._threads[0].join()
        self._context.term()
        for thread in self._threads:
            thread.join()

    # ---- on the threads

    def _work(self) -> None:
        import msgpack

        ends = False
        while not ends:
            items = [self._queue.get()]
            while len(items) < _MOST_AT_ONCE and not self._queue.empty():
                items.append(self._queue.get())
            ends = None in items
            if self._overflowed:
                # The subscribers' picture has holes: they begin anew, and miss at most what is still cached.
                self._overflowed = False
                items = [("cleared",)]
                while not ends and not self._queue.empty():
                    ends = self._queue.get() is None
            events = [event for item in items if item is not None for event in getattr(self._names, item[0])(*item[1:])]
            if not events:
                continue
            payload = msgpack.packb([time.time(), events, 0])
            with self._lock:
                sequence = self._sequence
                self._sequence += 1
                self._sent.append((sequence, payload))
            self._publisher.send_multipart([self.options.topic.encode(), sequence.to_bytes(8, "big"), payload])
        self._publisher.close()

    def _replay(self) -> None:
        """Answers [id, "", first sequence number] with [id, "", topic, number, payload] of each that is still there."""
        import zmq

        topic = self.options.topic.encode()
        try:
            while True:
                frames = self._replayer.recv_multipart()
                if len(frames) < 3 or len(frames[-1]) != 8:
                    logger.warning("a request for KV events was not understood: %d frames", len(frames))
                    continue
                start = int.from_bytes(frames[-1], "big")
                with self._lock:
                    kept = [(number, payload) for number, payload in self._sent if number >= start]
                for number, payload in kept:
                    self._replayer.send_multipart([frames[0], b"", topic, number.to_bytes(8, "big"), payload])
                self._replayer.send_multipart([frames[0], b"", topic, _END_OF_REPLAY, b""])
        except zmq.ContextTerminated:
            self._replayer.close()


def _tcp(endpoint: str) -> tuple[str, int] | None:
    if not endpoint.startswith("tcp://"):
        return None
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    return host, int(port)


def _reachable(endpoint: str) -> str:
    """For a client elsewhere: the host's name in place of `*`."""
    place = _tcp(endpoint)
    return endpoint if place is None or place[0] != "*" else f"tcp://{socket.gethostname()}:{place[1]}"

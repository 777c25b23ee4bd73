"""Replicas without Ray: engines over the fake device behind bridges, and a front over them as a client sees it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import orjson

from engine.config import CacheOptions, EngineConfig, SchedulerOptions, ServerOptions, StreamOptions
from engine.engine import Engine
from engine.executor.fake_oracle import FakeModel
from engine.forward import Limits
from engine.metrics import EngineMetrics
from server.app import build_app
from server.ray.bridge import Ask, Bridge, Head, Piece
from server.ray.front import REPLICA_HEADER, Front, GoneError
from tests.server.support import Device, served_model, tokenizer


@dataclass
class Local:
    """One replica, as a Backend. fails_at: how many pieces come before it is gone."""

    name: str
    bridge: Bridge
    engine: Engine
    device: Device
    fails_at: int | None = None
    asked: list[Ask] = field(default_factory=list)

    async def answer(self, ask: Ask) -> AsyncGenerator[Piece, None]:
        self.asked.append(ask)
        count = 0
        async with aclosing(self.bridge.answer(ask)) as pieces:
            async for piece in pieces:
                if count == self.fails_at:
                    raise GoneError("it is gone")
                count += 1
                yield (
                    Head(piece.status, [*piece.headers, (REPLICA_HEADER, self.name)])
                    if isinstance(piece, Head)
                    else piece
                )

    async def answer_all(self, ask: Ask) -> list[tuple[Head, bytes]]:
        pieces = [piece async for piece in self.answer(ask)]
        assert isinstance(pieces[0], Head)
        return [(pieces[0], b"".join(piece for piece in pieces if isinstance(piece, bytes)))]


@contextlib.asynccontextmanager
async def local(name: str = "demo", **options: Any) -> AsyncIterator[Local]:
    model = served_model()
    limits = Limits(8, 1024, model.max_model_len, 16, 512, tokenizer().vocab_size)
    config = EngineConfig(
        scheduler=SchedulerOptions(max_num_seqs=8),
        cache=CacheOptions(page_size=16, num_pages=512),
        stream=StreamOptions(flush_interval_ms=0.0),
        server=ServerOptions(drain_timeout_s=1.0, **options),
    )
    eos = tokenizer().eos_token_ids
    device = Device(limits, FakeModel(limits.vocab_size, eos[0], 0.0))
    engine = Engine(config, device, tokenizer(), eos_token_ids=eos, metrics=EngineMetrics(model_name=name))
    bridge = Bridge(build_app(engine, model, config.server), engine, config.server)
    await bridge.open()
    running = asyncio.create_task(engine.run())
    try:
        yield Local(name, bridge, engine, device)
    finally:
        device.gate.set()
        await bridge.close()
        running.cancel()
        await asyncio.wait({running})
        device.close()


@dataclass
class Answer:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    ended: bool = False

    def json(self) -> Any:
        return orjson.loads(self.body)


class Client:
    """One that speaks ASGI to a front."""

    def __init__(self, front: Front) -> None:
        self.front = front

    async def ask(
        self,
        path: str,
        fields: Any = None,
        *,
        method: str = "POST",
        leave: asyncio.Event | None = None,
        answer: Answer | None = None,
        **headers: str,
    ) -> Answer:
        """leave: the client goes once it is set. answer: is filled as it comes."""
        answer = Answer() if answer is None else answer
        body = fields if isinstance(fields, bytes) else b"" if fields is None else orjson.dumps(fields)
        told = [(b"content-type", b"application/json"), (b"host", b"test")]
        told += [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        unread = [{"type": "http.request", "body": body[:10], "more_body": True}]
        unread.append({"type": "http.request", "body": body[10:], "more_body": False})
        leave = leave or asyncio.Event()

        async def receive() -> dict[str, Any]:
            if unread:
                return unread.pop(0)
            await leave.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                answer.status = message["status"]
                answer.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            else:
                answer.body += message["body"]
                answer.ended = not message["more_body"]

        path, _, query = path.partition("?")
        scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode()}
        await self.front(scope | {"query_string": query.encode(), "headers": told}, receive, send)
        return answer

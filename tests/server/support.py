"""A live server over the real engine and the fake device, and small tools for its tests."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import itertools
import json
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import openai
from aiohttp import web

import engine.demo
from engine.config import (
    CacheOptions,
    EngineConfig,
    LoraOptions,
    SchedulerOptions,
    ServerOptions,
    SpeculationOptions,
    StreamOptions,
    TierOptions,
    TransferOptions,
)
from engine.engine import Engine
from engine.executor.base import StepHandle
from engine.executor.fake import FakeExecutor
from engine.executor.fake_oracle import FAKE_WIDTH, FakeModel
from engine.forward import ForwardOutput, Limits
from engine.metrics import EngineMetrics
from engine.models.abilities import Abilities
from engine.models.generation import GenerationDefaults
from engine.models.registry import read_spec
from engine.models.spec import Classifier
from engine.text.chat_template import ChatTemplate
from engine.text.tokenizer import Tokenizer
from engine.transfer.registry import make_connector
from server.app import ServedModel, build_app
from server.serving import serve
from server.state import STATE, State

DEMO = Path(engine.demo.__file__).parent
# Ends what hangs; machines that are busy take long for all else.
BOUND_S = 60.0
# Tokens that a score is read from.
YES, NO = 300, 301
CLASSIFIER = Classifier("cls", tuple("abcd"), (), "softmax")
ALL_ABILITIES = Abilities(embedding="mean", width=FAKE_WIDTH, score_tokens=(YES, NO), classifier=CLASSIFIER)


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.load(DEMO)


class Device(FakeExecutor):
    """The fake device with a gate: while it is closed, no step ends.

    script: token ids by position, said over and over instead of hashes.
    """

    def __init__(self, limits: Limits, model: FakeModel, step_seconds: float = 0.0, **options: Any) -> None:
        super().__init__(limits, model, step_seconds=step_seconds, **options)
        self.gate = asyncio.Event()
        self.gate.set()
        self.num_waited = 0
        self.script: list[int] | None = None

    async def wait(self, handle: StepHandle) -> ForwardOutput:
        await self.gate.wait()
        self.num_waited += 1
        return await super().wait(handle)

    def _sample(self, slots: list[int], draws: list[int], positions: list[int]) -> list[int]:
        if self.script is not None:
            return [self.script[position % len(self.script)] for position in positions]
        tokens = super()._sample(slots, draws, positions)
        if self.model.eos_rate:
            return tokens
        # The hash may hit any id; a test that counts tokens wants no surprise.
        return [token + (token == self.model.eos_token_id) for token in tokens]


@dataclasses.dataclass
class Live:
    engine: Engine
    state: State
    device: Device
    port: int
    http: aiohttp.ClientSession
    stop: asyncio.Event
    serving: asyncio.Task[None]
    app: web.Application

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @contextlib.asynccontextmanager
    async def openai(self, api_key: str = "none") -> AsyncIterator[openai.AsyncOpenAI]:
        async with openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0) as client:
            yield client

    async def post(self, path: str, body: Any, **options: Any) -> tuple[int, Any]:
        """Status and decoded JSON."""
        async with self.http.post(self.url + path, json=body, **options) as response:
            return response.status, json.loads(await response.read())

    async def complete(self, prompt: Any = "hello", **fields: Any) -> dict[str, Any]:
        status, body = await self.post("/v1/completions", {"prompt": prompt, **fields})
        assert status == 200, body
        return body

    async def events(self, path: str, body: Any) -> list[Any]:
        """A whole stream as its events: decoded chunks, "[DONE]", and comments as they are."""
        async with self.http.post(self.url + path, json={"stream": True, **body}) as response:
            raw = await response.read()
            assert response.status == 200, raw
            assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        return parse_events(raw)

    async def all_free(self) -> None:
        """Wait until no request is left anywhere and no page is in use."""
        await until(lambda: not self.busy())

    def num_requests(self) -> int:
        stats = self.engine.stats()
        return stats.num_running + stats.num_waiting

    def busy(self) -> bool:
        return bool(self.num_requests() or self.engine.stats().num_used_pages)


def parse_events(raw: bytes) -> list[Any]:
    assert raw.endswith(b"\n\n"), "events end in a blank line"
    events: list[Any] = []
    for event in raw.decode("utf-8").split("\n\n")[:-1]:
        assert "\n" not in event
        if event.startswith(":"):
            events.append(event)
            continue
        assert event.startswith("data: "), event
        data = event.removeprefix("data: ")
        events.append(data if data == "[DONE]" else json.loads(data))
    return events


def text_of(events: list[Any], index: int = 0) -> str:
    """The text of one choice of a stream, chat or completion."""
    text = ""
    for chunk in events:
        for choice in chunk["choices"] if isinstance(chunk, dict) else []:
            if choice["index"] == index:
                text += choice.get("text") or choice.get("delta", {}).get("content") or ""
    return text


def teach(server: Live, text: str, num_prompt_tokens: int) -> None:
    """Let the device say a text and its EOS, after a prompt of that many tokens."""
    ids = [*tokenizer().encode(text, add_special_tokens=False), tokenizer().eos_token_ids[0]]
    start = num_prompt_tokens % len(ids)
    server.device.script = ids[len(ids) - start :] + ids[: len(ids) - start]


def cuts(text: str, rng: random.Random) -> list[str]:
    """The text in pieces of random sizes."""
    places = sorted(rng.sample(range(1, len(text)), rng.randrange(len(text)))) if len(text) > 1 else []
    return [text[start:end] for start, end in itertools.pairwise([0, *places, len(text)])]


async def until(condition: Callable[[], bool]) -> None:
    """Poll the loop until the condition holds; a test that waits in vain fails."""
    async with asyncio.timeout(BOUND_S):
        while not condition():  # noqa: ASYNC110  (what is waited for has no event)
            await asyncio.sleep(0.001)


@functools.cache
def demo_template() -> ChatTemplate | None:
    """To compile it takes twice as long as to start a server, and no server changes it."""
    return ChatTemplate.load(DEMO)


def served_model(**changes: Any) -> ServedModel:
    model = ServedModel(
        names=("demo", "org/demo"),
        created=1_700_000_000,
        chat_template=demo_template(),
        generation_defaults=GenerationDefaults(),
        model_config=read_spec(DEMO),
        max_model_len=512,
        server_info={"device": "fake"},
        abilities=ALL_ABILITIES,
    )
    return dataclasses.replace(model, **changes)


@contextlib.asynccontextmanager
async def live(
    *,
    model: ServedModel | None = None,
    max_queued_requests: int = 1024,
    max_num_seqs: int = 64,
    num_pages: int = 4096,
    eos_rate: float = 0.0,
    step_seconds: float = 0.0,
    fail_on: Callable[[int], None] | None = None,
    make_device: Callable[[Limits], Any] | None = None,
    words: Tokenizer | None = None,
    lora: LoraOptions | None = None,
    transfer: TransferOptions | None = None,
    tiers: TierOptions | None = None,
    speculation: SpeculationOptions | None = None,
    weights: Callable[[Path | None], str] = str,
    **options: Any,
) -> AsyncIterator[Live]:
    """A server on a free port. make_device: an executor instead of the fake one. words: a tokenizer instead of the demo
    model's. options: ServerOptions."""
    model = model or served_model()
    limits = Limits(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=1024,
        max_model_len=model.max_model_len,
        page_size=16,
        num_pages=num_pages,
        vocab_size=tokenizer().vocab_size,
        max_adapters=0 if lora is None else lora.max_loras,
    )
    server_options = ServerOptions(**{"port": 0, "drain_timeout_s": 1.0, "weights_root": "/", **options})
    config = EngineConfig(
        scheduler=SchedulerOptions(max_num_seqs=max_num_seqs, max_queued_requests=max_queued_requests),
        cache=CacheOptions(page_size=16, num_pages=num_pages),
        stream=StreamOptions(flush_interval_ms=0.0),
        server=server_options,
        lora=lora or LoraOptions(),
        transfer=transfer or TransferOptions(),
        tiers=tiers or TierOptions(),
        speculation=speculation or SpeculationOptions(),
    )
    eos = tokenizer().eos_token_ids
    if make_device is not None:
        device = make_device(limits)
    else:
        device = Device(limits, FakeModel(limits.vocab_size, eos[0], eos_rate), step_seconds, fail_on=fail_on)
    metrics = EngineMetrics(model_name="demo", max_model_len=model.max_model_len)
    engine_ = Engine(config, device, words or tokenizer(), eos_token_ids=eos if words is None else (), metrics=metrics)
    if engine_.adapters is not None:
        engine_.adapters.load_modules()
    if transfer is not None:
        engine_.enable_transfer(make_connector(transfer), weights)
    if tiers is not None:
        engine_.enable_tier(weights)
    loop = asyncio.get_running_loop()
    bound: asyncio.Future[int] = loop.create_future()
    stop = asyncio.Event()
    running = loop.create_task(engine_.run())
    app = build_app(engine_, model, server_options)
    serving = loop.create_task(
        serve(app, engine_, server_options, on_listening=lambda _, port: bound.set_result(port), stop=stop)
    )
    await asyncio.wait({bound, serving}, return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        serving.result()
    try:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(BOUND_S)) as http:
            yield Live(engine_, app[STATE], device, bound.result(), http, stop, serving, app)
    finally:
        if isinstance(device, Device):
            device.gate.set()
        stop.set()
        await serving
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        device.close()

"""What every handler gets to see: the engine, the model's public face, the options, and what is in flight.

Made by `build_app`, one per application, found under `STATE`. Loop thread only.
"""

from __future__ import annotations

import asyncio
import functools
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import TracebackType

from aiohttp import web

from engine.config import ServerOptions
from engine.engine import Engine
from engine.lora.store import AdapterStore
from engine.models.abilities import Abilities
from engine.models.generation import GenerationDefaults
from engine.models.spec import ModelSpec
from engine.recorder import Tracer
from engine.request import MAX_TOP_LOGPROBS, RequestError
from engine.text.chat_template import ChatTemplate
from engine.text.grammar.compiler import GrammarCompiler
from engine.text.tokenizer import Tokenizer
from server.accounts import Accounts
from server.keyring import Key, Keyring
from server.kv_events import KVEvents
from server.live_feed import LiveFeed
from server.parsers.base import ReasoningFamily, ToolFamily
from server.rendering.renderer import Renderer
from server.request_log import Usage
from server.response_store import ResponseStore
from server.spans import Spans

# How each type is called, and its bytes.
_DTYPES = {"float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2)}


@dataclass(frozen=True, slots=True)
class Stored:
    """What a checkpoint is: its format, the type of most of its weights, and their bytes."""

    format: str
    type: str
    size: int


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The one model of this server.

    names: what clients may call it; the first is its own. any_name: they may call it anything. created: Unix seconds.
    server_info: resolved options and the like, for /server_info. stored: None for one that is as its config.json says.
    adapters: of the engine, None where it takes none. max_logprobs: most alternatives beside a token.
    """

    names: tuple[str, ...]
    created: int
    chat_template: ChatTemplate | None
    generation_defaults: GenerationDefaults
    model_config: ModelSpec
    max_model_len: int
    server_info: dict[str, object] = field(default_factory=dict)
    abilities: Abilities = field(default_factory=Abilities)
    any_name: bool = False
    stored: Stored | None = None
    adapters: AdapterStore | None = None
    max_logprobs: int = MAX_TOP_LOGPROBS

    @property
    def checkpoint(self) -> Stored:
        """What is told of the weights: of the matrices, as they are stored."""
        if self.stored is not None:
            return self.stored
        name, size = _DTYPES[self.model_config.dtype]
        return Stored("safetensors", name, self.model_config.num_parameters * size)

    def knows(self, name: str) -> bool:
        """Whether clients may call the model so."""
        return self.any_name or name in self.names


class InFlight:
    """Counts HTTP requests being answered: `with in_flight:` around each, `idle` set while there are none."""

    def __init__(self) -> None:
        self.count = self.total = 0
        self.idle = asyncio.Event()
        self.idle.set()

    def __enter__(self) -> None:
        self.count += 1
        self.total += 1
        self.idle.clear()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.count -= 1
        if not self.count:
            self.idle.set()


@dataclass(frozen=True)
class State:
    """submitted: engine requests whose handlers are still there, so that they can be ended: each id, and the names that
    a client may know it by.

    compiler: None where the model has no tokenizer, or no token to end a text with. tool_family, reasoning_family:
    how the model writes calls and reasoning, None where it is not known or not wanted. responses: of /v1/responses.
    keyring: keys of clients. accounts: tokens by API key. traces: those that are being recorded. spans: where
    OpenTelemetry is told, if anywhere. live: what /live shows. renderer: of the pages' answers.
    """

    engine: Engine
    model: ServedModel
    options: ServerOptions
    compiler: GrammarCompiler | None = None
    tool_family: ToolFamily | None = None
    reasoning_family: ReasoningFamily | None = None
    in_flight: InFlight = field(default_factory=InFlight)
    submitted: dict[str, tuple[str, ...]] = field(default_factory=dict)
    responses: ResponseStore = field(default_factory=ResponseStore)
    keyring: Keyring = field(default_factory=lambda: Keyring(()))
    renderer: Renderer = field(default_factory=Renderer)
    accounts: Accounts = field(default_factory=Accounts)
    traces: set[Tracer] = field(default_factory=set)
    spans: Spans | None = None
    kv_events: KVEvents | None = None

    @functools.cached_property
    def live(self) -> LiveFeed:
        return LiveFeed(self.engine, self.accounts, self.responses, show_text=self.options.live_text)

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises RequestError (400) on a model that came without one."""
        if self.engine.tokenizer is None:
            raise RequestError("This model has no tokenizer; send token ids to /v1/completions.")
        return self.engine.tokenizer


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent the HTTP request that this task answers, as far as the server itself knows.

    key: which API key it came with, "" without one; owner: that key with its limits. timeout_s: what its header asks
    for.
    """

    key: str = ""
    owner: Key | None = None
    timeout_s: float | None = None


# Set by the gate. Not an argument, so that no route can forget to pass on whose prompt it is.
CALLER: ContextVar[Caller] = ContextVar("caller", default=Caller())  # noqa: B039  (it is frozen)
# What the HTTP request of this task has used so far. Set by the gate.
USAGE: ContextVar[Usage] = ContextVar("usage")
STATE = web.AppKey("state", State)
# The id that the server gave the HTTP request.
REQUEST_ID = web.RequestKey("request_id", str)
# What goes out as X-Request-Id: the client's own word where it sent one.
ECHOED_ID = web.RequestKey("echoed_id", str)
# A client's id that may be put into a header; any other is replaced by ours.
ID_PATTERN = r"[!-~]{1,128}"

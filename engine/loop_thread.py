"""The engine's loop in a thread of its own: what LLM hands its requests to."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Coroutine, Mapping
from dataclasses import replace
from typing import Any, NoReturn, Protocol, TypeVar

import orjson
import uvloop

from engine.build import Built
from engine.lora.words import AdapterError
from engine.request import Adapter, Request, RequestError, UnavailableError
from engine.stream import TokenStream
from engine.text.grammar.compiler import GrammarCompiler
from engine.text.grammar.spec import GrammarSpec
from engine.text.grammar.state import Grammar

logger = logging.getLogger("oneloop.llm")

T = TypeVar("T")
# A JSON schema, or any kind of grammar.
Structure = GrammarSpec | Mapping[str, Any]


class LoraRequest(Protocol):
    """vLLM's LoRARequest, or whatever has these two: an adapter that is loaded where nobody has yet."""

    @property
    def lora_name(self) -> str: ...

    @property
    def lora_path(self) -> str: ...


# The name of an adapter, or one with its path.
Lora = str | LoraRequest


class Runner:
    """The thread of the engine's loop. Knows nothing of the LLM, so that one that is forgotten can be closed."""

    def __init__(self, built: Built) -> None:
        self.closed = False
        self._engine = built.engine
        self._compiler: GrammarCompiler | None = None
        # All that is asked at once fits the engine's queue; the rest waits here.
        self._room = asyncio.Semaphore(built.engine.config.scheduler.max_queued_requests)
        self._lock = threading.Lock()
        self._stop = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop
        started = threading.Event()
        # A daemon: a script that forgets to close ends all the same.
        self._thread = threading.Thread(target=self._run, args=(started,), name="engine", daemon=True)
        self._thread.start()
        started.wait()

    def submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Run something on the engine's loop. Raises UnavailableError after `close`. Any thread."""
        with self._lock:
            if not self.closed:
                return asyncio.run_coroutine_threadsafe(work, self._loop)
        work.close()
        raise_closed()

    def close(self) -> None:
        """End the thread, and with it what still runs. Any thread; a second time does nothing."""
        with self._lock:
            if not self.closed:
                self.closed = True
                self._loop.call_soon_threadsafe(self._stop.set)
        # The collector may call this from anywhere.
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # On the thread.

    def _run(self, started: threading.Event) -> None:
        # Leaving the block cancels whatever is still there.
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._serve(started))
        if self._compiler is not None:
            self._compiler.close()
        if self._engine.tokenizer is not None:
            self._engine.tokenizer.close()
        self._engine.executor.close()

    async def _serve(self, started: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        running = self._loop.create_task(self._engine.run(serves=False))
        running.add_done_callback(_log_failure)
        started.set()
        await self._stop.wait()

    async def compile(self, structure: Structure | None) -> Grammar | None:
        """Raises RequestError for what makes no usable grammar."""
        if structure is None:
            return None
        engine = self._engine
        if engine.tokenizer is None or not engine.eos_token_ids:
            raise RequestError("This model has no token that ends a text, which a grammar needs.")
        if self._compiler is None:
            self._compiler = GrammarCompiler(engine.tokenizer, engine.eos_token_ids, engine.limits.vocab_size)
        if not isinstance(structure, GrammarSpec):
            structure = GrammarSpec("json_schema", orjson.dumps(dict(structure)).decode(), param="structure")
        return await self._compiler.compile_async(structure)

    async def adapter(self, lora: Lora | None) -> Adapter | None:
        """With its weights, which may have to be read. Raises RequestError for what is none, or cannot be used."""
        if lora is None:
            return None
        store = self._engine.adapters
        if store is None:
            raise RequestError("This LLM takes no LoRA adapters; make it with enable_lora=True.", param="lora")
        if isinstance(lora, str):
            return await store.get(lora)
        name, path = getattr(lora, "lora_name", None), getattr(lora, "lora_path", None)
        if not isinstance(name, str) or not isinstance(path, str):
            raise RequestError("`lora` must be a name, or have a `lora_name` and a `lora_path`.", param="lora")
        try:
            await store.add(name, path)
        except AdapterError as error:
            raise RequestError(f"The LoRA adapter `{name}` cannot be used: {error}", param="lora") from None
        return await store.get(name)

    @contextlib.asynccontextmanager
    async def submitted(self, request: Request, grammar: Grammar | None) -> AsyncIterator[TokenStream]:
        """The stream of a request, once there is room for it; leaving the block aborts it."""
        if grammar is not None:
            if (name := request.sampling.clash) is not None:
                raise RequestError(f"`{name}` cannot be combined with a structure.", param=name)
            request = replace(request, constraint=grammar.state())
        async with self._room, self._engine.submit(request) as stream:
            yield stream


def raise_closed() -> NoReturn:
    raise UnavailableError("This LLM is closed.") from None


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("the engine failed", exc_info=error)

"""A worker of NVIDIA Dynamo: `python -m engine.integrations.dynamo --model ... --discovery-backend file`.

Dynamo's frontend does HTTP, templates, tokens and tools, its router picks the worker; here is the engine alone, driven
by dynamo.common.backend (extra [dynamo], and ai-dynamo without what it requires). All flags of engine.serve but those
of HTTP. The KV cache's events go to the router over ZeroMQ on this machine unless --kv-events-config says otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import socket
import sys
import uuid
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

try:
    from dynamo.common.backend import EngineConfig as Registration
    from dynamo.common.backend import LLMEngine, LlmRegistration, WorkerConfig
    from dynamo.common.backend.health_check import build_health_check_payload
    from dynamo.common.backend.publisher import ComponentSnapshot, ZmqSource
    from dynamo.common.backend.run import run
    from dynamo.common.utils.token_ids import token_ids_to_list
    from dynamo.llm.exceptions import EngineShutdown, HttpError, InvalidArgument
except ImportError as error:
    # The extra cannot name ai-dynamo: what that requires is not all on the index that the rest comes from.
    MISSING = (
        f"a worker of Dynamo needs what is not here ({error}): pip install 'oneloop[dynamo]', "
        "then pip install --no-deps ai-dynamo, of the same version as ai-dynamo-runtime"
    )
    if __name__ == "__main__":
        sys.exit(f"error: {MISSING}")
    raise ImportError(MISSING) from None

from engine.build import Built, build_engine
from engine.config import EngineConfig, ServerOptions, StartupError
from engine.flags import config_from, make_parser
from engine.integrations.token_requests import Chunks, TokenRequest, read, without_eos
from engine.process import settle
from engine.request import FinishReason, Request, RequestError, derive_seed
from engine.stream import Delta
from engine.text.grammar.compiler import GrammarCompiler
from engine.text.grammar.state import Grammar
from engine.watchdog import Watchdog
from server import kv_events, request_log
from server.logprobs import Spelling

logger = logging.getLogger("oneloop.dynamo")

# Seconds between two looks at how full the cache is, for the router.
LOOK_EVERY_S = 0.25
METRICS_TIMEOUT_S = 2.0


@dataclass(slots=True)
class _End:
    """How the engine's loop ended, for the exit code; the runtime shuts down the same way either time."""

    failure: BaseException | None = None


_END = _End()


class OneloopEngine(LLMEngine):  # type: ignore[misc]
    """Dynamo's engine contract over this Engine. All of it runs on the loop that Dynamo's `run` makes."""

    def __init__(self, built: Built, events: kv_events.KVEvents | None) -> None:
        self._built = built
        self._engine = built.engine
        self._events = events
        self._loop_task: asyncio.Task[None] | None = None
        self._look: asyncio.Task[None] | None = None
        self._watchdog: Watchdog | None = None
        self._compiler: GrammarCompiler | None = None
        self._publisher: Any = None
        # Of Dynamo's contexts: the request that each became.
        self._running: dict[str, str] = {}
        self._closed = False

    # ---- start and end

    @classmethod
    async def from_args(cls, argv: list[str] | None = None) -> tuple[OneloopEngine, Any]:
        """Raises StartupError. The weights are read here, so that what is wrong with them is one line."""
        args = _parser().parse_args(argv)
        config = config_from(args)
        request_log.set_up(args.log_level, config.server.log_format)
        _check(config, args)
        built = build_engine(config)
        try:
            return cls(built, _events(built, config, args)), _worker_config(built, args)
        except BaseException:
            built.engine.executor.close()
            raise

    async def start(self, worker_id: int) -> Registration:
        """See BaseEngine."""
        engine, limits = self._engine, self._engine.limits
        if engine.tokenizer is not None and engine.eos_token_ids:
            self._compiler = GrammarCompiler(engine.tokenizer, engine.eos_token_ids, limits.vocab_size)
            self._compiler.prepare()
        settle()
        self._loop_task = asyncio.create_task(engine.run(), name="engine")
        self._loop_task.add_done_callback(self._on_end)
        options = engine.config.server
        stop = None
        if options.stall_action == "exit":
            loop = asyncio.get_running_loop()

            def stop() -> object:
                return loop.call_soon_threadsafe(engine.give_up)

        self._watchdog = Watchdog(engine.seconds_since_progress, options.stall_timeout_s, stop=stop)
        self._watchdog.start()
        if self._publisher is not None:
            self._look = asyncio.create_task(self._tell_load(), name="load")
        return Registration(
            model=str(self._built.directory),
            served_model_name=self._built.names[0],
            model_aliases=list(self._built.names[1:]),
            runtime_data={"engine": "oneloop"},
            llm=LlmRegistration(
                context_length=limits.max_model_len,
                kv_cache_block_size=limits.page_size,
                total_kv_blocks=limits.num_pages,
                max_num_seqs=limits.max_num_seqs,
                max_num_batched_tokens=limits.max_num_batched_tokens,
            ),
        )

    def _on_end(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or self._closed or (failure := task.exception()) is None:
            return
        logger.error("the engine failed: %s", failure)
        _END.failure = failure
        # Dynamo takes the worker off its list and ends it, as for any other signal.
        os.kill(os.getpid(), signal.SIGTERM)

    async def cleanup(self) -> None:
        """What still runs is told that it was cancelled. A second time does nothing."""
        if self._closed:
            return
        self._closed = True
        engine = self._engine
        for task in (self._look, self._loop_task):
            if task is not None:
                if task is self._loop_task and not task.done():
                    engine.drain()
                    engine.abort_all()
                task.cancel()
                await asyncio.wait({task})
        if self._watchdog is not None:
            self._watchdog.close()
        if self._compiler is not None:
            self._compiler.close()
        if self._events is not None:
            await asyncio.to_thread(self._events.close)
        if not engine.stalled:  # it would wait for what hangs
            engine.executor.close()

    # ---- requests

    async def generate(self, request: Mapping[str, Any], context: Any) -> AsyncGenerator[dict[str, Any], None]:
        """Chunks as they come. What cannot be served is an HttpError with the status it stands for."""
        if self._loop_task is None or self._loop_task.done():
            raise EngineShutdown("The engine has ended.")
        try:
            wanted, grammar = await self._read(request)
            made = self._request(wanted, grammar)
            async with self._engine.submit(made) as stream:
                self._running[context.id()] = made.request_id
                try:
                    if context.is_stopped():
                        self._engine.abort(made.request_id)
                    chunks = Chunks(wanted, stream, Spelling(self._engine.tokenizer, False))
                    async for delta in stream:
                        if delta.finish_reason is FinishReason.ERROR:
                            raise _failed(delta)
                        yield chunks.next(delta)
                finally:
                    self._running.pop(context.id(), None)
        except RequestError as error:
            # Of an HttpError the frontend shows the status alone, of this the sentence, too.
            if error.status == 400:
                raise InvalidArgument(str(error)) from None
            raise HttpError(error.status, str(error)) from None

    async def abort(self, context: Any) -> None:
        """See BaseEngine: the client has left, or wants no more."""
        if (request_id := self._running.get(context.id())) is not None:
            self._engine.abort(request_id)

    async def _read(self, request: Mapping[str, Any]) -> tuple[TokenRequest, Grammar | None]:
        engine = self._engine
        try:
            token_ids = token_ids_to_list(request.get("token_ids")) or []
        except (TypeError, ValueError) as error:
            raise RequestError(f"`token_ids` cannot be read: {error}.", param="token_ids") from None
        vocab_size = engine.limits.vocab_size
        most = engine.config.logprobs.most_of(vocab_size)
        wanted = read(request, token_ids, self._built.generation_defaults, vocab_size, most)
        wanted = replace(wanted, sampling=without_eos(wanted.sampling, engine.eos_token_ids))
        self._check_name(wanted.model)
        if wanted.structure is None:
            return wanted, None
        if self._compiler is None:
            raise RequestError("This model has no token that ends a text, which a structure needs.")
        if (name := wanted.sampling.clash) is not None:
            raise RequestError(f"`{name}` cannot be combined with a structure.", param=name)
        return wanted, await self._compiler.compile_async(wanted.structure)

    def _check_name(self, name: str) -> None:
        """A request without one is a health check."""
        if name and name not in self._built.names and name != str(self._built.directory):
            error = RequestError(f"There is no model `{name[:128]}` here.", param="model")
            error.status = 404
            raise error

    def _request(self, wanted: TokenRequest, grammar: Grammar | None) -> Request:
        sampling = wanted.sampling
        seed = None if sampling.seed is None else derive_seed(sampling.seed, 0)
        return Request(
            request_id=f"dynamo-{uuid.uuid4().hex}",
            prompt_token_ids=wanted.token_ids,
            sampling=replace(sampling, seed=seed),
            namespace=wanted.namespace,
            priority=wanted.priority,
            constraint=None if grammar is None else grammar.state(),
        )

    # ---- what Dynamo asks of it

    async def kv_event_sources(self) -> list[Any]:
        """See LLMEngine: what the router learns this worker's cache by."""
        if self._events is None:
            return []
        endpoint = self._events.options.endpoint.replace("*", "127.0.0.1")
        return [ZmqSource(endpoint=endpoint, topic=self._events.options.topic, dp_rank=0)]

    async def health_check_payload(self) -> dict[str, Any] | None:
        """One token, by way of the whole engine."""
        tokenizer = self._engine.tokenizer
        first = None if tokenizer is None else tokenizer.bos_token_id
        payload: dict[str, Any] = build_health_check_payload(bos_token_id=0 if first is None else first)
        return payload

    async def is_quiescent(self) -> bool | None:
        """Nothing runs or waits."""
        return self._engine.scheduler.is_empty

    def component_metrics_dp_ranks(self) -> list[int]:
        """See BaseEngine: this worker is one rank."""
        return [0]

    def attach_snapshot_publisher(self, publisher: Any) -> None:
        """See BaseEngine."""
        self._publisher = publisher
        if self._loop_task is not None and self._look is None:
            # On whichever thread the runtime calls.
            self._loop_task.get_loop().call_soon_threadsafe(self._begin_to_look)

    def _begin_to_look(self) -> None:
        if not self._closed and self._look is None:
            self._look = asyncio.create_task(self._tell_load(), name="load")

    async def _tell_load(self) -> None:
        told = None
        while True:
            stats, counters = self._engine.stats(), self._engine.scheduler.counters
            asked = counters.prefix_cache_queries
            now = ComponentSnapshot(
                kv_used_blocks=stats.num_used_pages,
                kv_total_blocks=stats.num_total_pages,
                gpu_cache_usage=stats.kv_usage,
                dp_rank=0,
                kv_cache_hit_rate=counters.prefix_cache_hits / asked if asked else None,
            )
            if now != told:
                told = now
                self._publisher.publish(0, now)
            await asyncio.sleep(LOOK_EVERY_S)

    async def register_prometheus(self, metrics: Any) -> None:
        """The engine's own /metrics beside the runtime's. It asks on a thread of its own."""
        loop = asyncio.get_running_loop()

        def text() -> str:
            async def rendered() -> bytes:
                return self._engine.metrics.render()

            return asyncio.run_coroutine_threadsafe(rendered(), loop).result(METRICS_TIMEOUT_S).decode()

        metrics.register_prometheus_expfmt_callback(text)


def _failed(delta: Delta) -> RequestError:
    error = RequestError(delta.error or "The model failed to compute this request.")
    error.status = delta.status
    return error


# ---- flags


def _parser() -> argparse.ArgumentParser:
    parser = make_parser()
    parser.prog = "python -m engine.integrations.dynamo"
    parser.description = "Serve a language model as a worker of NVIDIA Dynamo."
    group = parser.add_argument_group("dynamo")
    group.add_argument("--namespace", default=os.environ.get("DYN_NAMESPACE", "dynamo"), help="default: %(default)s")
    group.add_argument("--component", default="backend", help="default: %(default)s")
    group.add_argument("--endpoint", default="generate", help="default: %(default)s")
    group.add_argument("--endpoint-types", default="chat,completions", help="default: %(default)s")
    group.add_argument(
        "--discovery-backend",
        default=os.environ.get("DYN_DISCOVERY_BACKEND", "etcd"),
        help="etcd, kubernetes, file (in DYN_FILE_KV) or mem (default: %(default)s)",
    )
    group.add_argument(
        "--request-plane", default=os.environ.get("DYN_REQUEST_PLANE", "tcp"), help="default: %(default)s"
    )
    group.add_argument("--event-plane", default=os.environ.get("DYN_EVENT_PLANE"), help="zmq or nats")
    group.add_argument("--dyn-tool-call-parser", metavar="NAME", help="the frontend's, for this model")
    group.add_argument("--dyn-reasoning-parser", metavar="NAME", help="the frontend's, for this model")
    group.add_argument(
        "--disaggregation-mode",
        choices=["agg", "prefill", "decode", "encode"],
        default="agg",
        help="agg is what this worker does; the others are refused",
    )
    group.add_argument("--disable-kv-routing", action="store_true", help="tell routers neither events nor load")
    return parser


def _check(config: EngineConfig, args: argparse.Namespace) -> None:
    """Raises StartupError for flags that mean nothing here."""
    if args.disaggregation_mode != "agg":
        raise StartupError(
            f"--disaggregation-mode {args.disaggregation_mode}: this worker computes prompts and answers itself; "
            "--disaggregation-mode agg"
        )
    if config.lora.enable:
        # An alias arrives here as the model's own name: an adapter's would be answered without the adapter.
        raise StartupError("--enable-lora: a Dynamo worker cannot tell adapters apart yet; serve them by engine.serve")
    if args.chat_template is not None and not Path(args.chat_template).is_file():
        raise StartupError("--chat-template: the frontend reads a file, and this is none")
    plain = ServerOptions()
    given = replace(
        config.server,
        kv_events=plain.kv_events,
        log_format=plain.log_format,
        stall_action=plain.stall_action,
        stall_timeout_s=plain.stall_timeout_s,
    )
    if given != config_from(make_parser().parse_args([])).server:
        raise StartupError("HTTP is the frontend's here: flags of the server, its keys and its parsers have no meaning")


def _events(built: Built, config: EngineConfig, args: argparse.Namespace) -> kv_events.KVEvents | None:
    given = config.server.kv_events
    if args.disable_kv_routing:
        if given is not None:
            raise StartupError("--disable-kv-routing and --kv-events-config contradict each other")
        return None
    cache = built.engine.scheduler.kv_cache
    if given is not None:
        options = kv_events.parse(given)
    elif built.engine.config.cache.enable_prefix_caching:
        options = kv_events.KVEventOptions(endpoint=f"tcp://127.0.0.1:{_free_port()}")
    else:
        options = None
    if options is None:
        return None
    events = kv_events.KVEvents(options, cache.page_size)
    cache.watch(events)
    if built.engine.tier is not None:
        built.engine.tier.watch(events)
    return events


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _worker_config(built: Built, args: argparse.Namespace) -> Any:
    if not built.abilities.generates:
        raise StartupError(f"{built.names[0]} is for embeddings or scores; a Dynamo worker generates text")
    if not built.directory.is_dir() or built.engine.tokenizer is None:
        raise StartupError(
            f"{built.directory}: Dynamo's frontend needs a directory with tokenizer.json and config.json"
        )
    return WorkerConfig(
        namespace=args.namespace,
        component=args.component,
        endpoint=args.endpoint,
        model_name=str(built.directory),
        served_model_name=built.names[0],
        endpoint_types=args.endpoint_types,
        discovery_backend=args.discovery_backend,
        request_plane=args.request_plane,
        event_plane=args.event_plane,
        custom_jinja_template=args.chat_template,
        tool_call_parser=args.dyn_tool_call_parser,
        reasoning_parser=args.dyn_reasoning_parser,
        enable_kv_routing=not args.disable_kv_routing,
    )


def main() -> int:
    try:
        run(OneloopEngine)
    except StartupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    if _END.failure is not None:
        print(f"error: the engine failed: {_END.failure}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

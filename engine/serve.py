"""Composition root: flags -> config -> engine -> app -> uvloop.run. `python -m engine.serve --help`.

The only module that knows both the engine and the server. Heavy imports happen after the flags are read, so that
--help and a mistyped flag answer at once.
"""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from engine.build import Built
    from engine.config import EngineConfig
    from engine.watchdog import Deadline
    from server.state import ServedModel, Stored

STARTED_AT = time.perf_counter()
# Behind a drain come the ends of connections, of the journal, of the device's last step, of threads: all of them
# together may take this long, in seconds, before the process ends without them.
LEAVE_S = 5.0


def main(argv: list[str] | None = None, *, ends: bool = False) -> int:
    """Serve until SIGINT or SIGTERM. Returns the exit code: 0 after a clean end, 1 after a failure.

    ends: the process is to end behind it, and is ended LEAVE_S after the drain where it does not.
    """
    import gc
    import logging

    from engine.config import StartupError
    from engine.flags import as_given, parse, shows_keys

    debug = False
    try:
        config, log_level = parse(argv)
        debug = log_level == "debug"
        from engine.process import begin

        begin()
        from server import request_log

        request_log.set_up(log_level, config.server.log_format)
        from engine.build import build_engine
        from engine.report import StartupReport

        if shows_keys(sys.argv if argv is None else argv):
            logging.getLogger("oneloop.start").warning(
                "a key on the command line is seen by everybody who can list processes; ONELOOP_API_KEY, "
                "ONELOOP_ADMIN_API_KEY or --key-file do not show it"
            )
        check(config)
        report = StartupReport(STARTED_AT)
        report.phases["imports"] = report.total_seconds
        built = build_engine(config, report)
        import uvloop

        from engine.watchdog import Deadline

        return uvloop.run(_run(config, built, Deadline() if ends else None))
    except StartupError as error:
        gc.unfreeze()  # what libraries hold is let go at the end
        if debug:
            logging.exception("start failed")
        print(f"error: {as_given(str(error), sys.argv[1:] if argv is None else argv)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        gc.enable()


def check(config: EngineConfig) -> None:
    """Raises StartupError for what is misspelled or missing, before the weights are read."""
    from server import accounts, kv_events, spans, trace_file
    from server.handover import path_of
    from server.parsers.registry import choose_parsers
    from server.serving import make_tls

    make_tls(config.server)
    if config.server.handover is not None:
        path_of(config.server.handover)
    choose_parsers(config.server.tool_call_parser, config.server.reasoning_parser, "")
    if config.server.prices is not None:
        accounts.PriceList.load(config.server.prices)
    if config.server.trace_file is not None:
        trace_file.check(config.server.trace_file)
    if config.server.otlp_traces_endpoint is not None:
        spans.check(config.server.otlp_traces_endpoint)
    if config.server.kv_events is not None and kv_events.parse(config.server.kv_events) is not None:
        kv_events.check()


def served_model(config: EngineConfig, built: Built) -> ServedModel:
    """What the server tells of the model. Raises StartupError without a tokenizer."""
    from engine.config import StartupError
    from server.app import ServedModel

    engine = built.engine
    if engine.tokenizer is None:
        raise StartupError(f"{built.directory}: no tokenizer.json; a server needs one, also with --load-format dummy")
    return ServedModel(
        names=built.names,
        created=int(time.time()),
        chat_template=built.chat_template,
        generation_defaults=built.generation_defaults,
        model_config=built.model_config,
        max_model_len=engine.limits.max_model_len,
        max_logprobs=config.logprobs.most_of(built.model_config.vocab_size),
        server_info=_server_info(config, built),
        abilities=built.abilities,
        any_name="*" in config.model.served_names,
        stored=_stored(built.directory),
    )


async def _run(config: EngineConfig, built: Built, deadline: Deadline | None = None) -> int:
    """The loop task and the web server, side by side, until one of them ends."""
    import asyncio
    import contextlib
    import functools
    import logging

    engine, report = built.engine, built.report
    with report.phase("imports"):
        from engine.process import settle
        from engine.watchdog import Watchdog
        from server.app import build_app
        from server.serving import serve
        from server.trace_file import TraceFile

    model = served_model(config, built)
    scheme = "http" if config.server.ssl_certfile is None else "https"

    def on_listening(host: str, port: int) -> None:
        table = report.table()
        engine.metrics.startup_seconds = dict(report.phases)
        model.server_info["startup_seconds"] = {**report.phases, "total": sum(report.phases.values())}
        print(f"\noneloop is ready, process {os.getpid()}\n{table}\n", flush=True)
        print(_hello(f"{scheme}://{host if ':' not in host else f'[{host}]'}:{port}", built), flush=True)

    stop, options = asyncio.Event(), config.server
    loop = asyncio.get_running_loop()
    exits = options.stall_action == "exit"
    watchdog = Watchdog(
        engine.seconds_since_progress,
        options.stall_timeout_s,
        stop=functools.partial(loop.call_soon_threadsafe, engine.give_up) if exits else None,
    )
    watchdog.start()
    loop_task = asyncio.create_task(engine.run(), name="engine")
    # A failed engine has nothing left to serve: what is connected gets its error event, then the process ends.
    loop_task.add_done_callback(lambda _: stop.set())

    has_served = False

    def on_leaving(seconds: float) -> None:
        nonlocal has_served
        has_served = True
        if deadline is not None:
            deadline.within(seconds + LEAVE_S)

    code = 1
    try:
        async with contextlib.AsyncExitStack() as stack:
            # The trie of the vocabulary, which grammars walk, is most of this.
            with report.phase("routes and grammars"):
                app = build_app(engine, model, config.server)
            settle()
            if config.server.trace_file is not None:
                await stack.enter_async_context(TraceFile(config.server.trace_file).running(engine.recorder))
            await serve(app, engine, config.server, on_listening=on_listening, stop=stop, on_leaving=on_leaving)
        code = 0
    finally:
        watchdog.close()
        failure = loop_task.exception() if loop_task.done() and not loop_task.cancelled() else None
        # Where it could not listen, the line that says why comes first, however long the end takes.
        if deadline is not None and has_served:
            # Everybody is told and everything is written: what is still at work, works for nobody.
            deadline.within(LEAVE_S, code=code if failure is None else 1)
        loop_task.cancel()
        await asyncio.wait({loop_task})
        assert engine.tokenizer is not None
        # Texts and templates that wait for a thread: at its end a process would work through all of them.
        engine.tokenizer.close()
        if not engine.stalled:  # it would wait for what hangs
            engine.executor.close()
    if failure is not None:
        print(f"error: the engine failed: {failure}", file=sys.stderr)
        return 1
    logging.getLogger("oneloop.server").info("stopped")
    return 0


def _stored(checkpoint: Path) -> Stored | None:
    """Of a GGUF file, whose types config.json would not tell; None for any other checkpoint."""
    from engine.models.gguf.reader import is_gguf, open_gguf
    from server.state import Stored

    return Stored("gguf", *open_gguf(checkpoint).weights()) if is_gguf(checkpoint) else None


def _hello(url: str, built: Built) -> str:
    """The URL, and a line to paste that brings an answer; beside the demo model, how to get a real one."""
    from engine.flags import DEMO_MODEL

    fox, abilities = "Tell me a story about a fox.", built.abilities
    if not abilities.generates and abilities.score_tokens is not None:
        path, prompt = "rerank", '"query": "What is a fox?", "documents": ["A fox is an animal.", "Paris is a city."]'
    elif not abilities.generates:
        path, prompt = "embeddings", f'"input": "{fox}"'
    elif built.chat_template is not None:
        path, prompt = "chat/completions", f'"stream": true, "messages": [{{"role": "user", "content": "{fox}"}}]'
    else:
        path, prompt = "completions", '"stream": true, "prompt": "Once upon a time", "max_tokens": 64'
    key = ""
    if built.engine.config.server.num_keys:
        key = " -H 'Authorization: Bearer YOUR_KEY'"
    more = ""
    if built.directory.resolve() == DEMO_MODEL.resolve():
        more = "\nThis demo model is a toy; a real assistant (98 MB): make serve MODEL=smollm2\n"
    return (
        f"OpenAI-compatible API at {url}/v1, for example:\n\n"
        f"  curl -N {url}/v1/{path}{key} -H 'Content-Type: application/json' \\\n"
        f'    -d \'{{"model": "{built.names[0]}", {prompt}}}\'\n{more}'
    )


def _server_info(config: EngineConfig, built: Built) -> dict[str, object]:
    """What /server_info tells: the resolved options, without the keys."""
    import dataclasses

    options = dataclasses.asdict(config)
    options["server"]["api_keys"] = config.server.num_keys
    del options["server"]["key_entries"]
    options["server"]["admin_api_key"] = config.server.admin_api_key is not None
    limits = built.engine.limits
    return {
        "options": options,
        "architecture": built.model_config.architecture,
        "num_pages": limits.num_pages,
        "page_size": limits.page_size,
        "max_total_num_tokens": limits.capacity,
        "max_model_len": limits.max_model_len,
        "vocab_size": limits.vocab_size,
        "start_up": dict(built.report.rows),
    }


if __name__ == "__main__":
    sys.exit(main(ends=True))

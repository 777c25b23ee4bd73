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
    from server.state import Stored

STARTED_AT = time.perf_counter()


def main(argv: list[str] | None = None) -> int:
    """Serve until SIGINT or SIGTERM. Returns the exit code: 0 after a clean end, 1 after a failure."""
    import logging

    from engine.config import StartupError
    from engine.flags import parse

    debug = False
    try:
        config, log_level = parse(argv)
        debug = log_level == "debug"
        logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        from engine.build import build_engine
        from engine.report import StartupReport
        from server.parsers.registry import choose_parsers

        # A misspelled name ends the start before the weights are read.
        choose_parsers(config.server.tool_call_parser, config.server.reasoning_parser, "")

        report = StartupReport(STARTED_AT)
        report.phases["imports"] = report.total_seconds
        built = build_engine(config, report)
        import uvloop

        return uvloop.run(_run(config, built))
    except StartupError as error:
        if debug:
            logging.exception("start failed")
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


async def _run(config: EngineConfig, built: Built) -> int:
    """The loop task and the web server, side by side, until one of them ends."""
    import asyncio
    import gc

    from engine.config import StartupError
    from server.app import ServedModel, build_app, serve

    engine, report = built.engine, built.report
    if engine.tokenizer is None:
        raise StartupError(f"{built.directory}: no tokenizer.json; a server needs one, also with --load-format dummy")
    model = ServedModel(
        names=built.names,
        created=int(time.time()),
        chat_template=built.chat_template,
        generation_defaults=built.generation_defaults,
        model_config=built.model_config,
        max_model_len=engine.limits.max_model_len,
        server_info=_server_info(config, built),
        abilities=built.abilities,
        any_name="*" in config.model.served_names,
        stored=_stored(built.directory),
    )

    def on_listening(host: str, port: int) -> None:
        engine.metrics.startup_seconds = dict(report.phases)
        model.server_info["startup_seconds"] = {**report.phases, "total": report.total_seconds}
        print(f"\noneloop is ready, process {os.getpid()}\n{report.table()}\n", flush=True)
        print(_hello(f"http://{host if ':' not in host else f'[{host}]'}:{port}", built), flush=True)

    # What has been loaded stays: the collector need not look at it again, which would stall the loop for long.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    stop = asyncio.Event()
    loop_task = asyncio.create_task(engine.run(), name="engine")
    # A failed engine has nothing left to serve: what is connected gets its error event, then the process ends.
    loop_task.add_done_callback(lambda _: stop.set())
    try:
        await serve(
            build_app(engine, model, config.server), engine, config.server, on_listening=on_listening, stop=stop
        )
    finally:
        failure = loop_task.exception() if loop_task.done() and not loop_task.cancelled() else None
        loop_task.cancel()
        await asyncio.wait({loop_task})
        engine.executor.close()
    if failure is not None:
        print(f"error: the engine failed: {failure}", file=sys.stderr)
        return 1
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
    if built.engine.config.server.api_keys:
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
    options["server"]["api_keys"] = len(config.server.api_keys)
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
    sys.exit(main())

"""The flags of the server -> ServerOptions: where it listens, who may call, what it refuses, how it is watched."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from engine.config import ServerOptions, StartupError
from engine.flag_types import (
    budget,
    count,
    given,
    json_object,
    not_negative,
    not_negative_count,
    port,
    positive,
    show_defaults,
    template_kwargs,
)

if TYPE_CHECKING:
    from engine.keys import KeyEntry


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    server = parser.add_argument_group("server")
    server.add_argument("--host", help="127.0.0.1 is this machine alone, 0.0.0.0 listens to all")
    server.add_argument("--port", type=port, help="0 takes a free one")
    server.add_argument("--api-key", nargs="+", metavar="KEY", help="also from the environment: ONELOOP_API_KEY")
    server.add_argument(
        "--admin-api-key", metavar="KEY", help="for admin routes, instead of --api-key; also ONELOOP_ADMIN_API_KEY"
    )
    server.add_argument(
        "--key-file",
        metavar="FILE",
        help="keys with limits, TOML or JSON: name, sha256, requests_per_minute, tokens_per_minute, concurrent, "
        "priority, weight, monthly_tokens, models",
    )
    server.add_argument("--ssl-certfile", metavar="FILE", help="serve HTTPS with this certificate chain (PEM)")
    server.add_argument("--ssl-keyfile", metavar="FILE", help="its private key, where it is not in the same file")
    server.add_argument(
        "--weights-root", metavar="DIR", help="the directory that /update_weights_from_disk may read weights from"
    )
    server.add_argument(
        "--weight-update-timeout",
        type=positive,
        metavar="S",
        help="drop what a trainer sent where it stops amid an update for so long",
    )
    server.add_argument(
        "--write-timeout", type=positive, metavar="S", help="cut off a client that reads nothing for so long"
    )
    server.add_argument(
        "--header-timeout", type=positive, metavar="S", help="cut off one that sends no whole request head"
    )
    server.add_argument(
        "--max-connections-per-address",
        type=not_negative_count,
        metavar="N",
        help="0 is any number; IPv6 counts by network of 64 bits",
    )
    server.add_argument(
        "--max-host-memory",
        type=count,
        metavar="BYTES",
        help="of the process: near it caches are emptied, then new requests get a 429, then a 503",
    )
    server.add_argument(
        "--isolate-api-keys",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="no prefix cache across API keys; on where several are set",
    )
    server.add_argument("--protect-metrics", action="store_true", help="/metrics needs the key too")
    server.add_argument(
        "--no-web",
        "--no-webui",
        dest="web",
        action="store_false",
        help="no pages for people (/ and /live), only the API",
    )
    server.add_argument(
        "--allowed-origins",
        nargs="+",
        metavar="ORIGIN",
        help="web pages that may read answers (CORS): local (those of this machine, the default), '*' (all), none, or "
        "origins",
    )
    server.add_argument(
        "--refuse-max-tokens",
        action="store_true",
        help="a max_tokens that does not fit the context is an error; otherwise it is cut to what fits",
    )
    server.add_argument("--max-body-bytes", type=count, metavar="BYTES", help="longest body of a request, inflated")
    server.add_argument(
        "--drain-timeout",
        "--shutdown-timeout",
        dest="drain_timeout",
        type=not_negative,
        metavar="S",
        help="how long accepted requests may go on after SIGTERM or Ctrl-C",
    )
    server.add_argument(
        "--resume-journal",
        metavar="FILE",
        help="write background responses down, so that the next process takes up those that this one could not end",
    )
    server.add_argument(
        "--handover",
        metavar="unix:PATH",
        help="take the listening socket of the server at PATH, which then finishes what it has; and offer it in turn",
    )
    server.add_argument(
        "--sse-keep-alive-interval",
        type=not_negative,
        metavar="S",
        help="between comments in a stream without news; 0 is off",
    )
    server.add_argument(
        "--stall-timeout",
        type=positive,
        metavar="S",
        help="no step comes to an end in so long: /health is 503, and every thread's stack goes to the log",
    )
    server.add_argument(
        "--stall-action", choices=["report", "exit"], help="exit: and the process ends, every stream told"
    )
    server.add_argument("--metrics-prefix", metavar="NAME", help="vllm, sglang, or a prefix of your own")
    server.add_argument(
        "--tool-call-parser",
        metavar="NAME",
        help="how the model writes tool calls: hermes, llama3_json, ..., none, or auto (by its chat template)",
    )
    server.add_argument(
        "--reasoning-parser",
        metavar="NAME",
        help="how the model marks its reasoning: qwen3, deepseek_r1, ..., none, or auto (by its chat template)",
    )
    server.add_argument(
        "--response-store-size",
        type=not_negative_count,
        metavar="N",
        help="responses of /v1/responses that are kept for previous_response_id; 0 keeps none",
    )
    server.add_argument(
        "--response-store-bytes", type=count, metavar="BYTES", help="most memory for them; the oldest go first"
    )
    server.add_argument(
        "--default-chat-template-kwargs",
        type=template_kwargs,
        metavar="JSON",
        help="options of the chat template for requests without their own, such as '{\"enable_thinking\": false}'",
    )
    server.add_argument(
        "--reasoning-budget",
        type=budget,
        metavar="N",
        help="most tokens of reasoning where a request names no budget (-1: no limit, the default)",
    )
    server.add_argument(
        "--root-path",
        "--fastapi-root-path",
        dest="root_path",
        metavar="PATH",
        help="prefix that a proxy puts before routes",
    )
    show_defaults(server, ServerOptions(), sse_keep_alive_interval="keep_alive_interval_s")


def add_watching_flags(parser: argparse.ArgumentParser) -> None:
    watching = parser.add_argument_group("watching it")
    watching.add_argument("--log-level", choices=["debug", "info", "warning", "error"], default="info")
    watching.add_argument("--log-format", choices=["text", "json"], help="json: an object a line")
    watching.add_argument(
        "--access-log",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="a line for each HTTP request, with its tokens and times; on with --log-format json",
    )
    watching.add_argument("--live-text", action="store_true", help="/live and /requests/{id}/cache show prompts' text")
    watching.add_argument("--trace-file", metavar="FILE", help="write a trace of the whole run there (ui.perfetto.dev)")
    watching.add_argument(
        "--prices", metavar="FILE", help="JSON or TOML: what tokens cost (currency, per, cached, prompt, output, keys)"
    )
    watching.add_argument(
        "--otlp-traces-endpoint", metavar="URL", help="send OpenTelemetry spans there (pip install 'oneloop[otel]')"
    )
    watching.add_argument(
        "--kv-events-config",
        type=json_object,
        metavar="JSON",
        help="publish what the KV cache gains and loses, for routers: vLLM's object (pip install 'oneloop[kv-events]')",
    )
    show_defaults(watching, ServerOptions())


def server_options(args: argparse.Namespace) -> ServerOptions:
    """Raises StartupError for keys and files that cannot be used."""
    if args.api_key and not all(args.api_key):
        raise StartupError("--api-key: a key is empty")
    admin_key = args.admin_api_key
    if admin_key is None:
        admin_key = os.environ.get("ONELOOP_ADMIN_API_KEY") or None
    elif not admin_key:
        raise StartupError("--admin-api-key: the key is empty")
    entries: tuple[KeyEntry, ...] = ()
    if args.key_file is not None:
        from engine.keys import read_key_file

        try:
            entries = read_key_file(Path(args.key_file))
        except ValueError as error:
            raise StartupError(f"--key-file: {error}") from None
    if args.ssl_keyfile and not args.ssl_certfile:
        raise StartupError("--ssl-keyfile needs --ssl-certfile")
    keys = tuple(args.api_key or ()) or tuple(filter(None, [os.environ.get("ONELOOP_API_KEY")]))
    return ServerOptions(
        api_keys=keys,
        admin_api_key=admin_key,
        isolate_api_keys=args.isolate_api_keys,
        protect_metrics=args.protect_metrics,
        refuse_max_tokens=args.refuse_max_tokens,
        key_entries=entries,
        key_usage_path=f"{args.key_file}.usage" if args.key_file else None,
        weights_root=args.weights_root,
        handover=args.handover,
        resume_journal=args.resume_journal,
        ssl_certfile=args.ssl_certfile,
        ssl_keyfile=args.ssl_keyfile,
        live_text=args.live_text,
        trace_file=args.trace_file,
        access_log=args.log_format == "json" if args.access_log is None else args.access_log,
        prices=args.prices,
        otlp_traces_endpoint=args.otlp_traces_endpoint,
        kv_events=args.kv_events_config,
        web=args.web,
        **given(  # type: ignore[arg-type]
            weight_update_timeout_s=args.weight_update_timeout,
            write_timeout_s=args.write_timeout,
            header_timeout_s=args.header_timeout,
            max_host_memory=args.max_host_memory,
            max_connections_per_address=args.max_connections_per_address,
            host=args.host,
            log_format=args.log_format,
            allowed_origins=None if args.allowed_origins is None else _origins(args.allowed_origins),
            port=args.port,
            max_body_bytes=args.max_body_bytes,
            drain_timeout_s=args.drain_timeout,
            keep_alive_interval_s=args.sse_keep_alive_interval,
            metrics_prefix=args.metrics_prefix,
            stall_timeout_s=args.stall_timeout,
            stall_action=args.stall_action,
            root_path=args.root_path,
            tool_call_parser=args.tool_call_parser,
            reasoning_parser=args.reasoning_parser,
            response_store_size=args.response_store_size,
            response_store_bytes=args.response_store_bytes,
            default_chat_template_kwargs=args.default_chat_template_kwargs,
            reasoning_budget=None if args.reasoning_budget == -1 else args.reasoning_budget,
        ),
    )


def _origins(given: list[str]) -> tuple[str, ...]:
    return () if given == ["none"] else tuple(given)

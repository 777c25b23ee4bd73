"""Composition root of many replicas: `python -m engine.serve_ray --replicas 1..4 ...the server's flags...`.

Puts an application of Ray Serve together: a deployment for each model, whose replicas are this engine and its unchanged
server, and a front that routes between them (server/ray/). Needs the extra [ray]. `application` builds the same from
the `args` of a `serve deploy` file; see server/deploy/ray/.
"""

from __future__ import annotations

import argparse
import functools
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.config import EngineConfig
    from server.ray.deployments import Hosted
    from server.ray.scaling import Replicas

# Of a replica's process alone, or of a machine that several replicas may share.
_ALONE = {
    "handover": "--handover passes a listening socket on, and the replicas have none",
    "resume_journal": "--resume-journal is a file of one server",
    "trace_file": "--trace-file is a file of one server",
    "kv_events": "--kv-events-config binds a port of one server; the router knows the caches by itself",
    "key_usage_path": "--key-file counts what each key uses in one server; --api-key works",
}
_MODEL_KEYS = {"flags", "replicas", "cpus_per_replica"}
_KEYS = {"models", "fronts", "gpus", "upscale_delay_s", "downscale_delay_s"}


@dataclass(frozen=True, slots=True)
class Model:
    """One model and its replicas. log_level: of their processes. cpus: that Ray sets apart for each."""

    config: EngineConfig
    replicas: Replicas
    log_level: str = "info"
    cpus: float = 1.0


@dataclass(frozen=True, slots=True)
class Plan:
    """An application. fronts: processes that read requests. gpus: whether replicas get GPUs. Delays in seconds. router:
    a class of Serve's, as module:name."""

    models: tuple[Model, ...]
    fronts: int = 1
    gpus: bool = False
    upscale_delay_s: float = 5.0
    downscale_delay_s: float = 300.0
    router: str = "server.ray.router:CacheAwareRouter"


def read_model(flags: Sequence[str], replicas: str = "1", cpus: float = 1.0) -> Model:
    """The server's flags -> a model. Raises StartupError for what cannot be had several times."""
    from engine.config import StartupError
    from engine.flags import parse
    from server.ray.scaling import Replicas

    config, log_level = parse(flags)
    for name, why in _ALONE.items():
        if getattr(config.server, name) is not None:
            raise StartupError(f"{why}: not with replicas")
    if cpus <= 0:
        raise StartupError(f"--cpus-per-replica {cpus:g}: must be above 0")
    return Model(config, Replicas.parse(replicas), log_level, cpus)


def read_plan(args: Mapping[str, Any]) -> Plan:
    """The `args` of a deploy file. Raises StartupError, which names the key."""
    from engine.config import StartupError, shortened

    def known(given: Any, keys: set[str], where: str) -> Mapping[str, Any]:
        if not isinstance(given, Mapping):
            raise StartupError(f"{where} must be a mapping, not {given!r}")
        if unknown := sorted(given.keys() - keys):
            shown = shortened(str(unknown[0]))
            raise StartupError(f"{where}: unknown key {shown!r}; known are {', '.join(sorted(keys))}")
        return given

    def number(name: str, default: float, given: Mapping[str, Any]) -> float:
        value = given.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e6:
            raise StartupError(f"args: {name} must be a number of 0 or more, not {value!r}")
        return float(value)

    known(args, _KEYS, "args")
    models = args.get("models")
    if not isinstance(models, list) or not models:
        raise StartupError("args: models must be a list of at least one")
    read = []
    for index, given in enumerate(models):
        known(given, _MODEL_KEYS, f"args: models[{index}]")
        flags = given.get("flags", [])
        words = shlex.split(flags) if isinstance(flags, str) else [str(word) for word in flags]
        _refuse(words, _LISTENING, "has no effect in a model's flags: the file's http_options say where it listens")
        read.append(read_model(words, str(given.get("replicas", "1")), number("cpus_per_replica", 1.0, given)))
    fronts, gpus = args.get("fronts", 1), args.get("gpus", False)
    if isinstance(fronts, bool) or not isinstance(fronts, int) or not 1 <= fronts <= 1000:
        raise StartupError(f"args: fronts must be a number of 1 or more, not {fronts!r}")
    if not isinstance(gpus, bool):
        raise StartupError(f"args: gpus must be true or false, not {gpus!r}")
    return Plan(
        tuple(read), fronts, gpus, number("upscale_delay_s", 5.0, args), number("downscale_delay_s", 300.0, args)
    )


def host(config: EngineConfig, log_level: str) -> Hosted:
    """What a replica serves; runs in its process."""
    from engine.build import build_engine
    from engine.serve import check, served_model
    from server import request_log
    from server.app import build_app
    from server.ray.deployments import Hosted

    request_log.set_up(log_level, config.server.log_format)
    check(config)
    built = build_engine(config)
    built.engine.metrics.startup_seconds = dict(built.report.phases)
    return Hosted(built.engine, build_app(built.engine, served_model(config, built), config.server), config.server)


def deployment_options(model: Model, plan: Plan) -> dict[str, Any]:
    """Of one model's deployment, as Serve takes them; computed without Ray."""
    from server.ray import scaling

    options, scheduler = model.config.server, model.config.scheduler
    period_s = 1.0
    made: dict[str, Any] = {
        "max_ongoing_requests": scaling.max_ongoing(scheduler.max_num_seqs),
        "max_queued_requests": scheduler.max_queued_requests,
        "health_check_period_s": 5.0,
        "health_check_timeout_s": 30.0,
        "graceful_shutdown_wait_loop_s": 0.5,
        # The server has an access log of its own.
        "logging_config": {"enable_access_log": False},
        # The engine's own drain comes after Serve's, which waits for the same requests.
        "graceful_shutdown_timeout_s": options.drain_timeout_s + 10.0,
        "request_router_config": {
            "request_router_class": plan.router,
            "request_router_kwargs": {"period_s": period_s},
            "request_routing_stats_period_s": period_s,
            "request_routing_stats_timeout_s": 10.0,
        },
        **scaling.resources(model.config, model.cpus, plan.gpus),
    }
    if model.replicas.least == model.replicas.most:
        return made | {"num_replicas": model.replicas.least}
    return made | {
        "autoscaling_config": {
            "min_replicas": model.replicas.least,
            "max_replicas": model.replicas.most,
            "initial_replicas": model.replicas.least,
            "metrics_interval_s": 1.0,
            "look_back_period_s": 3.0,
            "upscale_delay_s": plan.upscale_delay_s,
            "downscale_delay_s": plan.downscale_delay_s,
            "policy": {"policy_function": "server.ray.scaling:policy"},
        }
    }


def build(plan: Plan, make: Any = host) -> Any:
    """The application of Ray Serve. make: what builds a replica's engine, of (config, log level)."""
    from ray import serve

    from server.ray.deployments import Ingress, Replica

    models = []
    for index, model in enumerate(plan.models):
        deployment = serve.deployment(Replica).options(name=f"model-{index}", **deployment_options(model, plan))
        models.append(deployment.bind(functools.partial(make, model.config, model.log_level)))
    first = plan.models[0].config.server
    most_body = max(model.config.server.max_body_bytes for model in plan.models)
    front = serve.deployment(Ingress).options(
        name="front",
        num_replicas=plan.fronts,
        # What waits, waits here for a replica: open connections, not work.
        max_ongoing_requests=100_000,
        graceful_shutdown_timeout_s=max(model.config.server.drain_timeout_s for model in plan.models) + 10.0,
        ray_actor_options={"num_cpus": 0.1},
        logging_config={"enable_access_log": False},
    )
    return front.bind(models, most_body, first.root_path)


def application(args: dict[str, Any]) -> Any:
    """`import_path: engine.serve_ray:application` of a deploy file."""
    return build(read_plan(args))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m engine.serve_ray",
        description="Replicas on Ray Serve. All other flags are the server's (python -m engine.serve --help), and go "
        "to every replica; --host and --port are where Serve's proxy listens.",
        allow_abbrev=False,
    )
    parser.add_argument("--replicas", default="1", help="a number, or the least and the most: 1..4 (default: 1)")
    parser.add_argument(
        "--also",
        action="append",
        default=[],
        metavar='"FLAGS"',
        help="another model of the same application, by its own flags, --replicas included; may be given again",
    )
    parser.add_argument("--fronts", type=int, default=1, help="processes that read requests (default: %(default)s)")
    parser.add_argument("--cpus-per-replica", type=float, default=1.0, help="that Ray sets apart (default: 1)")
    parser.add_argument("--gpus", action="store_true", help="each replica gets as many GPUs as it has ranks")
    parser.add_argument("--upscale-delay", type=float, default=5.0, metavar="S", help="default: %(default)s")
    parser.add_argument("--downscale-delay", type=float, default=300.0, metavar="S", help="default: %(default)s")
    parser.add_argument("--address", help="of a Ray cluster, or auto; default: one is started here, on 127.0.0.1")
    return parser


_LISTENING = ("--host", "--port", "--ssl-certfile", "--ssl-keyfile")
_WHOLE = ("--also", "--fronts", "--gpus", "--upscale-delay", "--downscale-delay", "--address", "--root-path")


def _refuse(words: Sequence[str], flags: Sequence[str], why: str) -> None:
    """Raises StartupError for a flag that would change nothing where it stands."""
    from engine.config import StartupError

    for word in words:
        if (name := word.partition("=")[0]) in flags:
            raise StartupError(f"{name} {why}")


def plan_from(argv: Sequence[str] | None) -> tuple[Plan, argparse.Namespace]:
    """Raises StartupError; exits with 2 on flags that nobody knows."""
    args, rest = make_parser().parse_known_args(argv)
    models = [read_model(rest, args.replicas, args.cpus_per_replica)]
    for text in args.also:
        words = shlex.split(text)
        _refuse(words, (*_LISTENING, *_WHOLE), "is of the whole application, and not of a model in --also")
        more, flags = make_parser().parse_known_args(words)
        models.append(read_model(flags, more.replicas, more.cpus_per_replica))
    plan = Plan(tuple(models), args.fronts, args.gpus, args.upscale_delay, args.downscale_delay)
    read_plan({"models": [{}], "fronts": args.fronts, "upscale_delay_s": args.upscale_delay,
               "downscale_delay_s": args.downscale_delay})  # fmt: skip
    return plan, args


def prepare(address: str | None) -> None:
    """What Ray reads from the environment as it is imported."""
    # Nothing here reports to anybody; who wants Ray's usage statistics says so.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address is None:
        # Keeps the daemons of a cluster of one machine on the loopback interface, on Linux too: without it Ray takes
        # 127.0.0.1 for the machine's address in its network, and listens everywhere.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")


def start(address: str | None) -> None:
    """Join a Ray cluster, or start one for this process alone. After `prepare`."""
    import ray

    here: dict[str, Any] = {} if address else {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    ray.init(address=address, namespace="serve", **here)


def main(argv: list[str] | None = None) -> int:
    """Serve until SIGINT or SIGTERM. Returns the exit code, as engine.serve does."""
    import signal
    import threading

    from engine.config import StartupError

    try:
        plan, args = plan_from(argv)
        prepare(args.address)
        try:
            import ray
            from ray import serve
        except ImportError as error:
            raise StartupError(f"replicas need {error.name}: pip install 'oneloop[ray]'") from None
        options = plan.models[0].config.server
        start(args.address)
        stop = threading.Event()
        try:
            http = {"host": options.host, "port": options.port}
            if options.ssl_certfile is not None:
                http |= {"ssl_certfile": options.ssl_certfile, "ssl_keyfile": options.ssl_keyfile or ""}
            serve.start(proxy_location="HeadOnly", http_options=http)
            serve.run(build(plan), name="oneloop", route_prefix="/")
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: stop.set())
            scheme = "http" if options.ssl_certfile is None else "https"
            print(f"\noneloop is ready on Ray Serve at {scheme}://{options.host}:{options.port}/v1\n", flush=True)
            stop.wait()
        finally:
            if args.address is None:
                serve.shutdown()
            else:
                # A cluster of others, with applications of theirs.
                serve.delete("oneloop")
            ray.shutdown()
    except (StartupError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    # Replicas look the functions up by this module's name, not by that of a script.
    from engine.serve_ray import main as started_main

    sys.exit(started_main())

"""Cache-aware routing of replicas on Ray Serve against turns: `.venv-scale-ray/bin/python -m bench.routing_ray`.

The loads and the replicas are those of bench/routing.py. Each run gets an application of its own, so that caches
begin empty; everything else (bridge, front, bounds) is the same.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import sys
from collections.abc import Iterator
from typing import Any

from bench.routing import Costs, add_cost_flags, add_load_flags, finish, in_turns, make_worker
from bench.server import free_port
from engine.config import EngineConfig
from engine.serve_ray import Plan, build, prepare, read_model, start

TURNS, CACHE_AWARE = "bench.round_robin:RoundRobinRouter", "server.ray.router:CacheAwareRouter"


def host_fake(costs: Costs, config: EngineConfig, log_level: str) -> Any:
    """What a replica serves: see engine.serve_ray.host."""
    from server.ray.deployments import Hosted

    engine, app = make_worker(costs, config.server)
    return Hosted(engine, app, config.server)


@contextlib.contextmanager
def routing(plan: Plan, costs: Costs, port: int) -> Iterator[str]:
    """An application's URL. Its replicas are new."""
    from ray import serve

    serve.run(build(plan, functools.partial(host_fake, costs)), name="oneloop", route_prefix="/")
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.delete("oneloop")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.routing_ray", description=__doc__)
    parser.add_argument("--json", action="store_true")
    add_cost_flags(parser)
    add_load_flags(parser)
    arguments = parser.parse_args()
    prepare(None)
    import ray
    from ray import serve

    port, costs = free_port(), Costs.of(arguments)
    plan = Plan((read_model(["--max-num-seqs", str(costs.rows)], str(arguments.replicas), 0.1),))
    start(None)
    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        routers = {"turns": TURNS, "cache-aware": CACHE_AWARE}
        opened = {
            name: functools.partial(routing, dataclasses.replace(plan, router=router), costs, port)
            for name, router in routers.items()
        }
        rows = in_turns(opened, arguments)
    finally:
        serve.shutdown()
        ray.shutdown()
    return finish(rows, "turns", "cache-aware", arguments)


if __name__ == "__main__":
    # Replicas look classes up by this module's name.
    from bench.routing_ray import main as started_main

    sys.exit(started_main())

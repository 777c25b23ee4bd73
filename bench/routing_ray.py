"""Cache-aware routing of replicas on Ray Serve against turns: `.venv-scale-ray/bin/python -m bench.routing_ray`.

The loads and the replicas are those of bench/routing.py. Each router gets an application of its own, so that caches
begin empty; everything else (bridge, front, bounds) is the same.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import functools
import json
import sys
from typing import Any

from bench.routing import Costs, add_cost_flags, add_load_flags, make_worker, measure_load, report
from bench.server import free_port
from engine.config import EngineConfig
from engine.serve_ray import Plan, build, prepare, read_model, start

TURNS, CACHE_AWARE = "bench.round_robin:RoundRobinRouter", "server.ray.router:CacheAwareRouter"


def host_fake(costs: Costs, config: EngineConfig, log_level: str) -> Any:
    """What a replica serves: see engine.serve_ray.host."""
    from server.ray.deployments import Hosted

    engine, app = make_worker(costs, config.server)
    return Hosted(engine, app, config.server)


async def _measure(url: str, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    figures = {}
    for load in arguments.loads:
        figures[load] = await measure_load(url, load, arguments)
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.routing_ray", description=__doc__)
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--json", action="store_true")
    add_cost_flags(parser)
    add_load_flags(parser)
    arguments = parser.parse_args()
    prepare(None)
    import ray
    from ray import serve

    port, costs = free_port(), Costs(arguments)
    model = read_model(["--max-num-seqs", str(costs.rows)], str(arguments.replicas), 0.1)
    start(None)
    figures: dict[str, dict[str, float]] = {}
    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        for name, router in (("turns", TURNS), ("cache-aware", CACHE_AWARE)):
            plan = dataclasses.replace(Plan((model,)), router=router)
            serve.run(build(plan, functools.partial(host_fake, costs)), name="oneloop", route_prefix="/")
            for load, row in asyncio.run(_measure(f"http://127.0.0.1:{port}", arguments)).items():
                figures[f"{name}, {load}"] = row
            serve.delete("oneloop")
    finally:
        serve.shutdown()
        ray.shutdown()
    if arguments.json:
        print(json.dumps(figures))
    else:
        print(report(figures))
        for load in arguments.loads:
            turns, aware = figures[f"turns, {load}"], figures[f"cache-aware, {load}"]
            print(f"{load}: TTFT p50 {turns['ttft_p50_ms'] / aware['ttft_p50_ms']:.2f} times better")
    return int(any(row["failed"] for row in figures.values()))


if __name__ == "__main__":
    # Replicas look classes up by this module's name.
    from bench.routing_ray import main as started_main

    sys.exit(started_main())

"""The router smg, its cache-aware policy against turns: `.venv-scale-smg/bin/python -m bench.routing_smg`.

The loads and the replicas are those of bench/routing.py. `make test-scale PART=smg` makes the environment; --smg-python
or ONELOOP_SMG_PYTHON names the Python of another one. Replicas stay, with empty caches for each run; a router is
started for each.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import shlex
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence

from bench.routing import Costs, add_cost_flags, add_load_flags, finish, in_turns
from bench.server import free_port, running

TURNS, CACHE_AWARE = "round_robin", "cache_aware"


def command(python: str, policy: str, workers: Sequence[str]) -> str:
    """Of a router on 127.0.0.1 alone, its figures too; {port} is where it listens."""
    words = [python, "-m", "smg", "launch", "--host", "127.0.0.1", "--port", "{port}", "--worker-urls", *workers]
    words += ["--policy", policy, "--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())]
    return " ".join(word if word == "{port}" else shlex.quote(word) for word in words)


def healthy(url: str) -> int:
    """Workers that the router at `url` would send to."""
    with urllib.request.urlopen(f"{url}/workers", timeout=5) as answer:
        return sum(worker["is_healthy"] for worker in json.load(answer)["workers"])


@contextlib.contextmanager
def routing(python: str, workers: Sequence[str], policy: str) -> Iterator[str]:
    """A router's URL. Nothing is cached in the workers."""
    for worker in workers:
        urllib.request.urlopen(urllib.request.Request(f"{worker}/flush_cache", b"", method="POST"), timeout=30).close()
    # Ready once it knows a worker; the others come in the same moment.
    with running(command=command(python, policy, workers), ready="/readiness") as router:
        url = f"http://127.0.0.1:{router.port}"
        while healthy(url) < len(workers):
            if router.process.poll() is not None:
                raise RuntimeError("the router has ended")
        yield url


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.routing_smg", description=__doc__)
    python = os.environ.get("ONELOOP_SMG_PYTHON", sys.executable)
    parser.add_argument("--smg-python", default=python, help="that has smg (default: %(default)s)")
    parser.add_argument("--json", action="store_true")
    add_cost_flags(parser)
    add_load_flags(parser)
    arguments = parser.parse_args()
    if subprocess.run([arguments.smg_python, "-c", "import smg"], capture_output=True, check=False).returncode:
        print(f"error: {arguments.smg_python} has no smg; see --smg-python", file=sys.stderr)
        return 1
    worker = shlex.join([sys.executable, "-m", "bench.routing", "worker", *Costs.of(arguments).flags])
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(running(command=f"{worker} --port {{port}}")) for _ in range(arguments.replicas)]
        urls = [f"http://127.0.0.1:{server.port}" for server in servers]
        opened = functools.partial(routing, arguments.smg_python, urls)
        rows = in_turns({name: functools.partial(opened, name) for name in (TURNS, CACHE_AWARE)}, arguments)
    return finish(rows, TURNS, CACHE_AWARE, arguments)


if __name__ == "__main__":
    sys.exit(main())

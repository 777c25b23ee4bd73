#!/usr/bin/env bash
# ray 2.60.0: a request router of one's own (ray.serve.request_router.RequestRouter with `choose_replicas`, the only
# abstract method) is asked again without a pause while all replicas are full: hundreds of times a
# second, each time with a call to a replica, whatever initial_backoff_s says. The pause is taken only where the router
# sets `pending_request.routing_context.should_backoff`, which the mixins for locality and multiplexing do.
#
# Seen: how often it is asked in 3 seconds, while one request runs and one waits, without and with that line.
# Needs python3 and pip. Exits with 1 when this has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet 'ray[serve]==2.60.0' 'fastapi==0.136.3'
cat > "$work/routers.py" <<'PY'
import asyncio
import os
import sys

from ray.serve.request_router import RequestRouter

CALLS = os.environ["CALLS"]  # a byte for each time that a router was asked


class Plain(RequestRouter):
    async def choose_replicas(self, candidate_replicas, pending_request=None):
        with open(CALLS, "ab") as calls:
            calls.write(b".")
        return [candidate_replicas]


class Pausing(Plain):
    async def choose_replicas(self, candidate_replicas, pending_request=None):
        pending_request.routing_context.should_backoff = True
        return await super().choose_replicas(candidate_replicas, pending_request)


class Busy:
    async def __call__(self):
        await asyncio.sleep(3)


def asked(name):
    """How often the router was asked until the second of two requests had its replica."""
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    options = {"max_ongoing_requests": 1, "request_router_config": RequestRouterConfig(request_router_class=f"routers:{name}")}
    handle = serve.run(serve.deployment(Busy).options(**options).bind(), name=name, route_prefix=None)
    open(CALLS, "wb").close()
    for answer in [handle.remote(), handle.remote()]:
        answer.result()
    return os.path.getsize(CALLS)


if __name__ == "__main__":
    import ray

    import routers

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    plain, pausing = routers.asked("Plain"), routers.asked("Pausing")
    print(f"asked {plain} times, and {pausing} times where it sets should_backoff")
    sys.exit(not plain > 5 * pausing)
PY
cd "$work"
CALLS="$work/calls" RAY_USAGE_STATS_ENABLED=0 RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 "$work/venv/bin/python" routers.py 2>/dev/null

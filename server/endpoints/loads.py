"""GET /v1/loads and /get_load (SGLang): what a router balances by."""

from __future__ import annotations

import datetime

from aiohttp import web

from server.protocol.errors import json_response
from server.state import STATE


async def loads(request: web.Request) -> web.Response:
    """One entry: this server is one data-parallel rank. Rates are since the last question."""
    engine = request.app[STATE].engine
    stats, rates = engine.stats(), engine.rates
    rates.update()
    most = engine.limits.max_num_seqs
    load = {
        "dp_rank": 0,
        "num_running_reqs": stats.num_running,
        "num_waiting_reqs": stats.num_waiting,
        "num_waiting_uncached_tokens": engine.num_waiting_uncached_tokens(),
        "num_total_reqs": stats.num_running + stats.num_waiting,
        "num_used_tokens": stats.num_used_tokens,
        "max_total_num_tokens": stats.num_total_tokens,
        "token_usage": round(stats.kv_usage, 4),
        "gen_throughput": round(rates.throughput, 2),
        "cache_hit_rate": round(rates.hit_rate, 4),
        "utilization": round(stats.num_running / most, 4),
        "max_running_requests": most,
    }
    now = datetime.datetime.now(datetime.UTC).isoformat()
    return json_response({"timestamp": now, "dp_rank_count": 1, "loads": [load]})


async def get_load(request: web.Request) -> web.Response:
    """num_tokens: in the cache in use, and still to be computed for those that wait."""
    engine = request.app[STATE].engine
    stats = engine.stats()
    load = {
        "dp_rank": 0,
        "num_reqs": stats.num_running + stats.num_waiting,
        "num_waiting_reqs": stats.num_waiting,
        "num_tokens": stats.num_used_tokens + engine.num_waiting_uncached_tokens(),
    }
    return json_response([load])


ROUTES = (("GET", "/v1/loads", loads), ("GET", "/get_load", get_load))

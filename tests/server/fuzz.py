"""`python -m tests.server.fuzz --requests 100000`: bodies that nobody thought of, for as long as one likes.

Those of test_fuzz.py, with other numbers for each seed: bytes of good bodies that were hit, fields of any value, odd
values at any depth, histories and declarations that were mixed up. A server of its own answers them, several at once,
on a fake device; what is neither a 200 nor a 4xx in its family's shape, or comes late, or leaves something behind, is
told with its body, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import copy
import json
import random
import sys
import time
from collections.abc import Callable
from typing import Any

import aiohttp

from server.protocol.ignored import HEADER
from tests.server.bad_fields import check_tei
from tests.server.bad_requests import FAMILIES
from tests.server.support import Live, live
from tests.server.test_fuzz import GOOD, HISTORIES, JSON, LIMITS, ODD, mutated, places, written

BYTES = (b'"', b"\\", b"[", b"}", b"\xff", b"\x00", b"e9", b"", b",", b":", b"-", b"1" * 400, b"\\ud800", b"null")
# Others would be aborted by one's odd words: a route, and a field.
ALONE = {"/abort_request"}
ABORTS = b"abort_all_requests"
# Requests on their way at a time, and how many go by before the server must be empty once.
AT_ONCE, ROUND = 8, 1000
# What does not come by then hangs; a busy machine takes its time.
PATIENCE_S = 120.0
NO_TIMEOUT = aiohttp.ClientTimeout()


def value(rng: random.Random, depth: int = 0) -> Any:
    """Any JSON value."""
    kind = rng.randrange(9 if depth < 4 else 7)
    if kind == 7:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 8:
        return {rng.choice(("type", "role", "content", "text", "name", "$ref", "")): value(rng, depth + 1)}
    simple: list[Callable[[], Any]] = [
        lambda: rng.choice(ODD),
        lambda: None,
        lambda: rng.random() < 0.5,
        lambda: rng.randint(-3, 130),
        lambda: rng.choice((1, -1)) * rng.getrandbits(rng.randrange(1, 200)),
        lambda: rng.choice((1, -1)) * 10.0 ** rng.uniform(-320, 308),
        lambda: "".join(chr(rng.choice((rng.randrange(32, 127), rng.randrange(0xD7FF)))) for _ in range(kind)),
    ]
    return simple[kind]()


def request(rng: random.Random) -> tuple[str, bytes]:
    """A route and a body."""
    kind = rng.randrange(4)
    if kind == 0:
        path = rng.choice(list(HISTORIES))
        field, history, tools = HISTORIES[path]
        body = {field: history, "tools": tools, LIMITS[path]: 1, "stream": rng.random() < 0.2}
        for name in rng.choice([(field,), ("tools",), (field, "tools")]):
            body[name] = mutated(rng, body[name])
        return path, written(body)
    if kind == 1:
        path, good = rng.choice([pair for pair in GOOD if pair[0] not in ALONE])
        body = {LIMITS[path]: 1, **copy.deepcopy(good)} if path in LIMITS else copy.deepcopy(good)
        for _ in range(rng.randint(1, 3)):
            container, key = rng.choice(places(body) or [({"x": 0}, "x")])
            if rng.random() < 0.2:
                del container[key]
            else:
                container[key] = value(rng)
        return path, written(body)
    family = rng.choice([family for family in FAMILIES if family.path not in ALONE])
    if kind == 2:
        names = sorted({name.replace("[", ".").split(".")[0] for name, _ in family.rows if name is not None})
        return family.path, written({**family.good, **{name: value(rng) for name in rng.choices(names, k=2)}})
    data = json.dumps(rng.choice([family.good, family.body(rng.choice(family.rows))])).encode()[:4000]
    for _ in range(rng.randint(1, 3)):
        start = rng.randrange(len(data) + 1)
        data = data[:start] + rng.choice(BYTES) + data[start + rng.randrange(5) :]
    return family.path, data


async def send(server: Live, path: str, data: bytes) -> int:
    """Raises AssertionError for an answer that must not be, TimeoutError for one that does not come."""
    async with (
        asyncio.timeout(PATIENCE_S),
        server.http.post(server.url + path, data=data, headers=JSON, timeout=NO_TIMEOUT) as got,
    ):
        answer = await got.read()
    # A body may ask for an answer in less time than there is.
    in_time = got.status == 504 and b'"timeout"' in data
    assert got.status == 200 or 400 <= got.status < 500 or in_time, f"{got.status} {answer[:300]!r}"
    assert "Set-Cookie" not in got.headers and len(got.headers.get(HEADER, "")) < 2000, "a header is the client's"
    if got.status != 200:
        told = json.loads(answer)
        check = next(family.check for family in FAMILIES if family.path == path)
        # A rerank with `texts` is text-embeddings-inference's, and has its errors.
        (check_tei if path == "/rerank" and "error_type" in told else check)(got.status, told, got.status)
    return int(got.status)


async def fuzz(count: int, seed: int) -> int:
    """Send that many; returns how many were answered wrongly."""
    statuses: collections.Counter[int] = collections.Counter()
    wrong = sent = 0
    slowest: tuple[float, int, str, bytes] = (0.0, 0, "", b"")
    began = time.monotonic()

    async def some(server: Live, rng: random.Random, numbers: range) -> None:
        nonlocal wrong, slowest
        for number in numbers:
            path, data = request(rng)
            data = data.replace(ABORTS, b"abort_nothing")
            start = time.monotonic()
            try:
                statuses[await send(server, path, data)] += 1
            except Exception as error:
                wrong += 1
                print(f"WRONG {number} {path} {type(error).__name__}: {error}\n  {data!r}", file=sys.stderr, flush=True)
            slowest = max(slowest, (time.monotonic() - start, number, path, data))

    async with live() as server:
        # A signal ends the server.
        while sent < count and not server.serving.done():
            size = min(ROUND, count - sent)
            rngs = [random.Random(f"{seed} {sent} {lane}") for lane in range(AT_ONCE)]
            await asyncio.gather(
                *(some(server, rng, range(sent + lane, sent + size, AT_ONCE)) for lane, rng in enumerate(rngs))
            )
            await server.all_free()
            sent += size
            if sent % (10 * ROUND) == 0:
                print(f"{sent} sent, {wrong} answered wrongly", flush=True)
    told = ", ".join(f"{status}: {number}" for status, number in sorted(statuses.items()))
    print(f"{sent} bodies of seed {seed} in {time.monotonic() - began:.0f} s, {wrong} answered wrongly; {told}")
    print(f"slowest: {slowest[0]:.2f} s, {slowest[1]} {slowest[2]} {slowest[3][:500]!r}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.server.fuzz", description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seed", type=int, help="by default the time of day, so that each hunt is new")
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else int(time.time())
    return 1 if asyncio.run(fuzz(arguments.requests, seed)) else 0


if __name__ == "__main__":
    sys.exit(main())

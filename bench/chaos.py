"""Faults under load, on the real server: `make chaos`.

terminate: SIGTERM at random moments amid streams; what was accepted must end whole, and the process be gone in time.
hand over: a new server takes over the socket again and again; no request may fail. faults: a device that raises, has no
memory, makes NaNs, samples what there is not, is slow, twice as often as --times each: a row without a token ends its
stream with an error and nothing else does, and the others have the text that they have without.
kill: kill -9, and the next start must serve. resume: kill -9 amid a background response with --resume-journal, and the
rest comes from the next start. lost, hang: a device that is gone or never answers must end the process, every stream
told. flood: 1,000 requests at once; each is refused before it begins or answered whole. storms: 200 streams whose
clients leave, five times; nothing of them may stay. hostile: long prompts, chats, schemas and packed bodies, each
answered, and the loop as seldom 50 ms late as without them. Prints a line for each and exits with 1 where something
broke.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gzip
import itertools
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import aiohttp
import orjson

from bench.server import free_port, running
from engine.serve import LEAVE_S
from engine.watchdog import GRACE_S

BODY = {"prompt": "Once upon a time", "max_tokens": 48, "stream": True, "ignore_eos": True, "temperature": 0}
FLAGS = "--device cpu --threads 1 --log-level error"
# The drain's 30 seconds, and what is left of the process then.
GONE_S = 30 + LEAVE_S + GRACE_S
# Of which every answer is one, else something broke.
WHOLE, REFUSED, TOLD = "whole", "refused", "told"


async def ask(session: aiohttp.ClientSession, url: str, expected: str | None = None) -> str:
    """One stream: whole, refused before it began, told of an error, or how it broke. expected: the text that a whole
    one has."""
    accepted = False
    try:
        async with session.post(f"{url}/v1/completions", json=BODY) as response:
            if response.status != 200:
                return REFUSED if response.status in (429, 503) else f"status {response.status}"
            accepted = True
            text = (await response.read()).decode()
    except aiohttp.ClientConnectorError:
        return "no connection"
    except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
        return f"{'cut off' if accepted else 'not answered'} ({type(error).__name__})"
    if not text.endswith("data: [DONE]\n\n"):
        return "without an end"
    if '"error"' in text:
        return TOLD
    if '"finish_reason":"length"' not in text:
        return "short"
    return WHOLE if expected in (None, text_of(text)) else "another text"


def text_of(stream: str) -> str:
    chunks = [orjson.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])


async def load(
    url: str, is_over: Callable[[], bool], clients: int, outcomes: Counter[str], expected: str | None = None
) -> None:
    async def client() -> None:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(60)) as session:
            while not is_over():
                found = await ask(session, url, expected)
                outcomes[found] += 1
                if found == "no connection":
                    await asyncio.sleep(0.02)

    await asyncio.gather(*(client() for _ in range(clients)))


async def terminate(times: int, rng: random.Random) -> Counter[str]:
    """Streams that were accepted before the signal are whole; later ones find no server, or one that refuses."""
    outcomes: Counter[str] = Counter()
    for _ in range(times):
        with running(FLAGS) as server:
            over = asyncio.Event()
            work = asyncio.create_task(load(f"http://127.0.0.1:{server.port}", over.is_set, 6, outcomes))
            await asyncio.sleep(rng.uniform(0.05, 0.8))
            server.process.send_signal(signal.SIGTERM)
            try:
                await asyncio.to_thread(server.process.wait, GONE_S)
            except subprocess.TimeoutExpired:
                outcomes[f"not gone after {GONE_S:g} s"] += 1
            over.set()
            await work
            if server.process.returncode not in (0, None):
                outcomes[f"exit {server.process.returncode}"] += 1
    # Those come after the end.
    outcomes.pop("no connection", None)
    for name in [name for name in outcomes if name.startswith("not answered")]:
        del outcomes[name]
    return outcomes


async def hand_over(times: int, rng: random.Random) -> Counter[str]:
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as directory:
        port, over = free_port(), asyncio.Event()
        words = [sys.executable, "-m", "engine.serve", "--port", str(port), *FLAGS.split()]
        words += ["--handover", f"unix:{directory}/s"]

        def start() -> subprocess.Popen[bytes]:
            return subprocess.Popen(words, stdout=subprocess.DEVNULL)

        process = start()
        await _ready(port)
        work = asyncio.create_task(load(f"http://127.0.0.1:{port}", over.is_set, 4, outcomes))
        for _ in range(times):
            await asyncio.sleep(rng.uniform(0.0, 0.5))
            following = start()
            code = await asyncio.to_thread(process.wait, 120)
            if code != 0:
                outcomes[f"exit {code}"] += 1
            process = following
        over.set()
        await work
        process.terminate()
        await asyncio.to_thread(process.wait, 60)
    return outcomes


async def _ready(port: int) -> None:
    async with aiohttp.ClientSession() as session:
        while True:
            try:
                async with session.get(f"http://127.0.0.1:{port}/health") as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientError:
                await asyncio.sleep(0.05)


# Of a kind of fault: how often a step has it, and how many streams may end with an error for each. A step that raised
# is tried again.
FAULTS = {
    "raise": (0.02, 0),
    "oom": (0.02, 0),
    "nan": (0.02, 1),
    "corrupt": (0.02, 1),
    "slow:s=0.02": (0.05, 0),
}


async def faults(times: int, rng: random.Random) -> Counter[str]:
    outcomes: Counter[str] = Counter()
    async with aiohttp.ClientSession() as session:
        with running(FLAGS) as server:
            url = f"http://127.0.0.1:{server.port}/v1/completions"
            async with session.post(url, json=BODY) as response:
                expected = text_of(await response.text())
        for fault, (share, most) in FAULTS.items():
            found: Counter[str] = Counter()
            kind, _, more = fault.partition(":")
            plan = f"{kind}:p={share},{more};seed={rng.randrange(10**6)}"
            with running(f"{FLAGS} --debug-faults '{plan}'") as server:
                url, over = f"http://127.0.0.1:{server.port}", asyncio.Event()
                work = asyncio.create_task(load(url, over.is_set, 6, found, expected))
                while not over.is_set():
                    await asyncio.sleep(0.2)
                    if await _injected(session, url, kind) >= 2 * times:
                        over.set()
                await work
                injected = await _injected(session, url, kind)
            ended = found[TOLD] + found["status 500"]
            print(f"  {kind} {injected:.0f} times: {dict(found)}", flush=True)
            if ended > most * injected:
                outcomes[f"streams hurt by {kind}"] += ended
            outcomes += found
    return outcomes


async def _injected(session: aiohttp.ClientSession, url: str, kind: str) -> float:
    text = await _metrics(session, url)
    found = re.search(rf'^oneloop_injected_faults_total\{{kind="{kind}"\}} (\S+)$', text, re.M)
    assert found is not None
    return float(found[1])


async def kill(times: int, rng: random.Random) -> Counter[str]:
    """Whoever was connected is cut off; what counts is that the next start is a good one."""
    outcomes: Counter[str] = Counter()
    for _ in range(max(1, times // 5)):
        with running(FLAGS) as server:
            over = asyncio.Event()
            work = asyncio.create_task(load(f"http://127.0.0.1:{server.port}", over.is_set, 4, Counter()))
            await asyncio.sleep(rng.uniform(0.05, 0.5))
            server.process.kill()
            await asyncio.to_thread(server.process.wait, 30)
            over.set()
            await work
        with running(FLAGS) as server:
            async with aiohttp.ClientSession() as session:
                outcomes[await ask(session, f"http://127.0.0.1:{server.port}")] += 1
    return outcomes


async def resume(times: int, rng: random.Random) -> Counter[str]:
    """A background response is followed, the server killed amid it, and the next one asked for the rest."""
    outcomes: Counter[str] = Counter()
    body = {
        "input": "Tell me a story.",
        "background": True,
        "max_output_tokens": 150,
        "ignore_eos": True,
        "temperature": 1,
    }
    with tempfile.TemporaryDirectory() as directory:
        flags = f"{FLAGS} --resume-journal {directory}/journal"
        for _ in range(times):
            told: dict[int, bytes] = {}
            with running(flags) as server:
                url = f"http://127.0.0.1:{server.port}/v1/responses"
                async with aiohttp.ClientSession() as session:
                    async with session.post(url, json=body) as response:
                        name = (await response.json())["id"]
                    asyncio.get_running_loop().call_later(rng.uniform(0.05, 0.6), server.process.kill)
                    await _follow(session, f"{url}/{name}?stream=true", told)
                await asyncio.to_thread(server.process.wait, 30)
            with running(flags) as server:
                url = f"http://127.0.0.1:{server.port}/v1/responses/{name}"
                async with aiohttp.ClientSession() as session:
                    after = max(told, default=-1)
                    await _follow(session, f"{url}?stream=true" + (f"&starting_after={after}" if told else ""), told)
                    async with session.get(url) as response:
                        whole = (await response.json())["output"][0]["content"][0]["text"]
            events = [orjson.loads(told[number]) for number in sorted(told)]
            text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
            good = sorted(told) == list(range(len(told))) and text == whole
            outcomes[WHOLE if good else "tokens lost or doubled"] += 1
    return outcomes


async def _follow(session: aiohttp.ClientSession, url: str, told: dict[int, bytes]) -> None:
    """Events by their number, as far as they come."""
    with contextlib.suppress(aiohttp.ClientError, ConnectionError):
        async with session.get(url) as response:
            async for line in response.content:
                if line.startswith(b"data: "):
                    number = orjson.loads(line[6:])["sequence_number"]
                    if number in told:
                        raise RuntimeError(f"event {number} came twice")
                    told[number] = line[6:]


async def lost(times: int, rng: random.Random) -> Counter[str]:
    return await _ending("lost:step={step}", times, rng)


async def hang(times: int, rng: random.Random) -> Counter[str]:
    return await _ending("hang:step={step} --stall-timeout 2 --stall-action exit", times, rng)


async def _ending(faults: str, times: int, rng: random.Random) -> Counter[str]:
    """What ends the process."""
    outcomes: Counter[str] = Counter()
    for _ in range(max(1, times // 5)):
        with running(f"{FLAGS} --debug-faults {faults.format(step=rng.randrange(20, 200))}") as server:
            ended = partial(_has_ended, server.process)
            await load(f"http://127.0.0.1:{server.port}", ended, 4, outcomes)
            if server.process.returncode in (None, 0):
                outcomes[f"exit {server.process.returncode}"] += 1
    # Those come after the end.
    return Counter(
        {name: count for name, count in outcomes.items() if not name.startswith(("no connection", "not answered"))}
    )


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    return process.poll() is not None


async def flood(times: int, rng: random.Random) -> Counter[str]:
    outcomes: Counter[str] = Counter()
    with running(f"{FLAGS} --max-queued-requests 200") as server:
        url = f"http://127.0.0.1:{server.port}"
        async with _session() as session:
            for _ in range(max(1, times // 25)):
                outcomes.update(await asyncio.gather(*(ask(session, url) for _ in range(1000))))
    return outcomes


async def storms(times: int, rng: random.Random) -> Counter[str]:
    outcomes: Counter[str] = Counter()
    with running(FLAGS) as server:
        url = f"http://127.0.0.1:{server.port}"

        async def leave() -> None:
            async with session.post(f"{url}/v1/completions", json=BODY) as response:
                await response.content.read(rng.randrange(1, 400))
                response.close()

        for _ in range(max(1, times // 10)):
            files = len(os.listdir(f"/proc/{server.process.pid}/fd"))
            async with _session() as session:
                await asyncio.gather(*(leave() for _ in range(200)))
                for _ in range(100):
                    held = sum(map(float, _HELD.findall(await _metrics(session, url))))
                    if not held:
                        break
                    await asyncio.sleep(0.1)
                else:
                    outcomes["requests or pages that stay"] += 1
                outcomes[await ask(session, url)] += 1
            await asyncio.sleep(0.2)  # for this side's sockets to be seen closed
            if (left := len(os.listdir(f"/proc/{server.process.pid}/fd")) - files) > 0:
                outcomes["files left open"] += left
    return outcomes


_HELD = re.compile(r"^vllm:(?:num_requests_running|num_requests_waiting|kv_cache_usage_perc)\{[^}]*\} (\S+)$", re.M)
_LAG = re.compile(r'^oneloop_loop_lag_seconds_bucket\{le="(0\.05|\+Inf)"\} (\S+)$', re.M)


def _hostile() -> list[tuple[str, dict[str, str], bytes]]:
    """Routes, headers, bodies, of at most 8 MB as they come or as they become."""
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(20):
        deep = {"type": "object", "properties": {"a": deep, "b": {"enum": list(range(50))}}, "required": ["a"]}
    wide = {"type": "object", "properties": {f"p{number}": {"type": "string"} for number in range(2000)}}
    chat, short = "/v1/chat/completions", [{"role": "user", "content": "x"}]
    asked: list[tuple[str, Any]] = [
        ("/v1/completions", {"prompt": "Once upon a time " * 235_000, "max_tokens": 1}),
        ("/v1/completions", {"prompt": list(range(1, 200)) * 5000, "max_tokens": 1}),
        (chat, {"messages": [{"role": "user", "content": f"{number}"} for number in range(10_000)], "max_tokens": 1}),
        *(
            (chat, {"messages": short, "max_tokens": 2, "guided_json": schema})
            for schema in (deep, wide, {"type": "string", "pattern": "(a{1,60}b?){1,60}" * 20})
        ),
    ]
    none: dict[str, str] = {}
    plain = [(path, none, orjson.dumps(body)) for path, body in asked]
    packed = {"Content-Encoding": "gzip"}
    bombs = [gzip.compress(b" " * size) for size in (7_000_000, 200_000_000)]
    return [*plain, *((chat, packed, bomb) for bomb in bombs), (chat, none, b"[" * 4_000_000)]


async def hostile(times: int, rng: random.Random) -> Counter[str]:
    outcomes: Counter[str] = Counter()
    bodies = _hostile()

    async def send(path: str, headers: dict[str, str], body: bytes) -> None:
        headers = {"Content-Type": "application/json", **headers}
        async with session.post(f"{url}{path}", data=body, headers=headers) as response:
            await response.read()
            told = response.status == 200 or 400 <= response.status < 500
            outcomes[REFUSED if told else f"status {response.status}"] += 1

    async def late() -> tuple[float, float]:
        found = dict(_LAG.findall(await _metrics(session, url)))
        return float(found["+Inf"]) - float(found["0.05"]), float(found["+Inf"])

    with running(FLAGS) as server:
        url, over = f"http://127.0.0.1:{server.port}", asyncio.Event()
        async with _session() as session:
            work = asyncio.create_task(load(url, over.is_set, 2, outcomes))
            for body in bodies:
                await send(*body)  # what is compiled, and grows, once
            seen = [await late()]
            begun = asyncio.get_running_loop().time()
            for number in range(max(len(bodies), times)):
                await send(*bodies[number % len(bodies)])
            seen.append(await late())
            await asyncio.sleep(asyncio.get_running_loop().time() - begun)
            seen.append(await late())
            over.set()
            await work
    (more, looks), (without, looks_without) = (
        (after[0] - before[0], after[1] - before[1]) for before, after in itertools.pairwise(seen)
    )
    print(f"  later than 50 ms: {more:.0f} of {looks:.0f} looks; without: {without:.0f} of {looks_without:.0f}")
    if more > without + looks / 50:
        outcomes["a loop that is late"] += round(more)
    return outcomes


def _session() -> aiohttp.ClientSession:
    """For any number of connections."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(300), connector=aiohttp.TCPConnector(limit=0))


async def _metrics(session: aiohttp.ClientSession, url: str) -> str:
    async with session.get(f"{url}/metrics") as response:
        return await response.text()


SCENES: dict[str, Callable[[int, random.Random], Coroutine[Any, Any, Counter[str]]]] = {
    "terminate": terminate,
    "hand over": hand_over,
    "faults": faults,
    "kill": kill,
    "resume": resume,
    "lost": lost,
    "hang": hang,
    "flood": flood,
    "storms": storms,
    "hostile": hostile,
}
# What may be seen beside whole answers.
ALLOWED = {
    "terminate": {REFUSED},
    "hand over": set(),
    "faults": {TOLD, "status 500"},
    "kill": set(),
    "resume": set(),
    "lost": {TOLD, REFUSED, "status 500"},
    "hang": {TOLD, REFUSED, "status 500"},
    "flood": {REFUSED},
    "storms": set(),
    "hostile": {REFUSED},
}

# Without one of these nothing was seen; whole answers elsewhere.
NEEDED = {"lost": TOLD, "hang": TOLD}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.chaos", description=__doc__)
    parser.add_argument("--times", type=int, default=50, help="of each (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=list(SCENES), nargs="+", default=list(SCENES))
    arguments = parser.parse_args()
    broken = 0
    for name in arguments.only:
        outcomes = asyncio.run(SCENES[name](arguments.times, random.Random(arguments.seed)))
        if not outcomes[needed := NEEDED.get(name, WHOLE)]:
            outcomes[f"none that is {needed}"] += 1
        bad = {found: count for found, count in outcomes.items() if found not in {WHOLE, *ALLOWED[name]}}
        broken += sum(bad.values())
        told = ", ".join(f"{found}: {count}" for found, count in outcomes.most_common())
        print(f"{name:10} {'BROKEN' if bad else 'ok':7} {told}", flush=True)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())

"""How long the loop stands still while large and hostile requests come, kind by kind: `python -m bench.stalls`.

The whole server over a fake device with room for a million tokens, in a process of its own, whose loop has a timer a
millisecond and tells how late it came at most: how long everybody else waits. "own" is the CPU time of the loop's
thread in that gap, "queue" how long it stood in line for a processor, which is not this server's fault; the rest it
stood in line for Python's lock, which a thread beside it held. "gc" is the longest collection of garbage in any thread.
"none" is the machine without a request. The goal is 50 ms.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import gzip
import logging
import os
import statistics
import sys
import threading
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import orjson
import uvloop

from bench import front
from bench.http import heard, process, tell
from engine.pace import waited
from engine.text.tokenizer import Tokenizer

BEAT_S = 0.001
GOAL_MS = 50.0
TEXT = "Once upon a time there was a fox. "
MAX_MODEL_LEN = 2_000_000
CHAT, ANTHROPIC, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"


def _schema(width: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{number}": {"type": "string"} for number in range(width)}}


def _deep() -> dict[str, Any]:
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(20):
        deep = {"type": "object", "properties": {"a": deep, "b": {"enum": list(range(50))}}, "required": ["a"]}
    return deep


def _turns(count: int, text: str = "hello") -> list[dict[str, str]]:
    """An odd number of them, so that the last is the user's."""
    return [{"role": ("user", "assistant")[number % 2], "content": f"{text} {number}"} for number in range(count | 1)]


def _tools(count: int) -> list[dict[str, Any]]:
    return [
        {"type": "function", "function": {"name": f"f{number}", "description": TEXT * 4, "parameters": _schema(20)}}
        for number in range(count)
    ]


def _chat(**fields: Any) -> tuple[str, dict[str, Any]]:
    return CHAT, {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2, **fields}


# Route and body, made when it is needed: together they are large.
JSON_KINDS: dict[str, Callable[[], tuple[str, dict[str, Any]]]] = {
    "text of 4 MB": lambda: ("/v1/completions", {"prompt": TEXT * 118_000, "max_tokens": 2}),
    "a million ids": lambda: ("/v1/completions", {"prompt": list(range(1, 200)) * 5000, "max_tokens": 2}),
    "a message of 4 MB": lambda: _chat(messages=[{"role": "user", "content": TEXT * 118_000}]),
    "10,000 messages": lambda: _chat(messages=_turns(10_000)),
    "60,000 messages": lambda: _chat(messages=_turns(60_000)),
    "10,000 turns, /v1/messages": lambda: (ANTHROPIC, {"messages": _turns(10_000), "max_tokens": 2}),
    "10,000 items, /v1/responses": lambda: (RESPONSES, {"input": _turns(10_000), "max_output_tokens": 16}),
    "100,000 parts": lambda: _chat(
        messages=[{"role": "user", "content": [{"type": "text", "text": "a"}] * 100_000}],
    ),
    "1,000 tools": lambda: _chat(tools=_tools(1000)),
    "a deep schema": lambda: _chat(guided_json=_deep()),
    "2,000 properties": lambda: _chat(guided_json=_schema(2000)),
    "50,000 properties": lambda: _chat(guided_json=_schema(50_000)),
    "a huge pattern": lambda: _chat(guided_json={"type": "string", "pattern": "(a{1,60}b?){1,60}" * 20}),
    "logit_bias of 300,000": lambda: _chat(logit_bias={str(number): 1 for number in range(300_000)}),
    "1,000 prompts": lambda: ("/v1/completions", {"prompt": [TEXT * 100] * 1000, "max_tokens": 2}),
    "100 choices of 30,000 ids": lambda: (
        "/v1/completions",
        {"prompt": list(range(1, 200)) * 150, "n": 100, "max_tokens": 2},
    ),
    "4 MB of unknown fields": lambda: _chat(metadata={f"k{number}": [number] * 10 for number in range(80_000)}),
}
RAW_KINDS: dict[str, Callable[[], tuple[str, bytes, bool]]] = {
    "a gzip bomb of 7 MB": lambda: (CHAT, gzip.compress(b" " * 7_000_000), True),
    "a gzip bomb of 200 MB": lambda: (CHAT, gzip.compress(b" " * 200_000_000), True),
    "brackets of 4 MB": lambda: (CHAT, b"[" * 4_000_000, False),
    "8 MB that are no JSON": lambda: (CHAT, b'{"messages": "' + b"x" * 8_000_000, False),
}
NONE = "none"
KINDS = (NONE, *JSON_KINDS, *RAW_KINDS)


def send(port: int, kind: str) -> int:
    """The status."""
    if kind in JSON_KINDS:
        path, fields = JSON_KINDS[kind]()
        data, packed = orjson.dumps(fields), False
    else:
        path, data, packed = RAW_KINDS[kind]()
    headers = {"Content-Type": "application/json"} | ({"Content-Encoding": "gzip"} if packed else {})
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            response.read()
            return int(response.status)
    except urllib.error.HTTPError as error:
        error.read()
        return error.code


class Heart:
    """Beats on the loop. tells: a late beat's line, with what the loop's thread was at while it was late."""

    def __init__(self, tells_ms: float | None) -> None:
        self.worst_ms = self.own_ms = self.queue_ms = self.gc_ms = 0.0
        self.told: list[str] = []
        gc.callbacks.append(self._on_collection)
        self._collecting = 0.0
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._due, self._used, self._waited = self._loop.time(), time.thread_time(), waited()
        self._beat()
        if tells_ms is not None:
            threading.Thread(target=self._look, args=(tells_ms / 1e3,), daemon=True).start()

    def reset(self) -> None:
        self.worst_ms = self.own_ms = self.queue_ms = self.gc_ms = 0.0
        self.told = []

    def _on_collection(self, phase: str, info: dict[str, int]) -> None:
        now = time.perf_counter()
        if phase == "start":
            self._collecting = now
        else:
            self.gc_ms = max(self.gc_ms, 1e3 * (now - self._collecting))

    def _beat(self) -> None:
        now, used, queued = time.monotonic(), time.thread_time(), waited()
        late_ms = 1e3 * (now - self._due)
        if late_ms > self.worst_ms:
            self.worst_ms, self.own_ms = late_ms, 1e3 * (used - self._used)
            self.queue_ms = 1e3 * (queued - self._waited)
        self._due, self._used, self._waited = now + BEAT_S, used, queued
        self._loop.call_at(self._due, self._beat)

    def _look(self, patience_s: float) -> None:
        """Stacks of all threads when a beat is late: who is at work, or holds the lock."""
        told_of = 0.0
        while True:
            time.sleep(0.002)
            due = self._due
            if time.monotonic() - due > patience_s and due != told_of:
                told_of = due
                frames = sys._current_frames()
                names = {thread.ident: thread.name for thread in threading.enumerate()}
                for ident, frame in frames.items():
                    if ident != threading.get_ident():
                        stack = traceback.extract_stack(frame)[-6:]
                        places = " < ".join(f"{one.filename[-30:]}:{one.lineno} {one.name}" for one in reversed(stack))
                        self.told.append(f"{names.get(ident)}: {places}")


async def serve_here(tells_ms: float | None) -> None:
    """The server's side. Speaks JSON lines: its port, and for each line on its input what the heart saw since."""
    args = argparse.Namespace(streams=4, rate=0.0, max_model_len=MAX_MODEL_LEN, logprobs=None, flush_interval_ms=None)
    words = Tokenizer.load(front.DEMO)
    engine = front.make_engine(args, words)
    heart = Heart(tells_ms)

    def answer() -> bool:
        if not os.read(sys.stdin.fileno(), 4096):
            return False
        front.say(worst=heart.worst_ms, own=heart.own_ms, queue=heart.queue_ms, gc=heart.gc_ms, told=heart.told)
        heart.reset()
        return True

    await front.serve_until(engine, MAX_MODEL_LEN, answer)


def measure(only: list[str], times: int, tells_ms: float | None) -> list[tuple[str, float, float, set[int]]]:
    """Kind, worst and middle stall in ms, statuses."""
    found = []
    options = [] if tells_ms is None else ["--tell", str(tells_ms)]
    with process("bench.stalls", "--serve", *options) as server:
        port = heard(server)["port"]
        for kind in only:
            stalls, statuses = [], set()
            for number in range(times + 1):
                tell([server], "begin")
                heard(server)
                if kind == NONE:
                    time.sleep(1.0)
                else:
                    statuses.add(send(port, kind))
                time.sleep(0.05)
                tell([server], "end")
                seen = heard(server)
                if number:  # the first grows what grows once
                    stalls.append((seen["worst"], seen["own"], seen["queue"], seen["gc"]))
                    for line in seen["told"]:
                        print(f"    {line}", file=sys.stderr)
            worst, own, queue, _ = max(stalls)
            middle, collector = statistics.median([one for one, *_ in stalls]), max(one for *_, one in stalls)
            found.append((kind, worst, middle, statuses))
            numbers = " ".join(f"{one:8.1f}" for one in (worst, middle, own, queue, collector))
            print(f"{kind:28} {numbers}   {sorted(statuses)}", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.stalls", description=__doc__)
    parser.add_argument("--only", choices=KINDS, nargs="+", default=list(KINDS), metavar="KIND", help="; ".join(KINDS))
    parser.add_argument("--times", type=int, default=5, help="of each, behind a first one (default: %(default)s)")
    parser.add_argument("--tell", type=float, metavar="MS", help="show the stacks of stalls that are longer")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        logging.basicConfig(level="ERROR")
        with contextlib.suppress(KeyboardInterrupt):
            uvloop.run(serve_here(args.tell))
        return 0
    print(f"{'ms':28} {'worst':>8} {'median':>8} {'own':>8} {'queue':>8} {'gc':>8}   status")
    late = [kind for kind, worst, *_ in measure(args.only, args.times, args.tell) if worst > GOAL_MS]
    print(f"over {GOAL_MS:g} ms: {', '.join(late) or 'none'}")
    return 1 if late else 0


if __name__ == "__main__":
    sys.exit(main())

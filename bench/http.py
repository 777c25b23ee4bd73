"""What a streamed token costs the loop: `python -m bench.http`, no model, real server, real sockets.

Server and clients are processes of their own: bench/front.py (a fake device that says a story, and all that is real
above it) and bench/listening.py. CPU is the loop thread's own. "write" is what the write system calls of so many events
cost alone, measured right after on the same sockets, and "python" all the rest. Stages come from a second run with
timers around the functions of each stage. With --rate a last run says how even the server's own writes are, beside the
steps of the device: what is added to that before a client has read is the client's, and the system's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

MICRO = 1e6
# Front ends of other engines, measured with one event a token on machines of about this kind: us of CPU a token.
PEERS = {"vLLM": 45.0, "SGLang": 37.0}
# Tokens of a stream; its memory is bounded by all of them.
MOST_TOKENS = 2**24
STAGES = ("commit", "detokenise", "queue", "encode", "write", "device")
_MESSAGES = [{"role": "user", "content": "Tell me a story about a fox named Lena."}]
_TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
# Route, and fields beside those that every request has.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {"messages": _MESSAGES}),
    "completions": ("/v1/completions", {"prompt": "Once upon a time"}),
    "tools": ("/v1/chat/completions", {"messages": _MESSAGES, "tools": [_TOOL]}),
    "logprobs": ("/v1/chat/completions", {"messages": _MESSAGES, "logprobs": True, "top_logprobs": 2}),
    "usage": (
        "/v1/chat/completions",
        {"messages": _MESSAGES, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    ),
    "whole": ("/v1/chat/completions", {"messages": _MESSAGES, "stream": False}),
}


@dataclass
class Figures:
    """One run. cpu, write, python: us a token. utilisation: CPU seconds of the loop thread a second.

    gaps_ms: between two events of a stream, median, 99th percentile and most; added_ms: p99 above the device's own.
    spread_ms: as the server sees it, see front.Spread.
    """

    kind: str
    streams: int
    rate: float
    tokens_per_second: float
    tokens_per_core_second: float
    tokens_per_event: float
    cpu: float
    write: float
    python: float
    cpu_per_event: float
    utilisation: float
    gaps_ms: list[float]
    added_ms: float | None
    stages: dict[str, float] = field(default_factory=dict)
    spread_ms: dict[str, list[float]] = field(default_factory=dict)


@contextlib.contextmanager
def process(*words: str) -> Iterator[subprocess.Popen[str]]:
    """A module of ours, until the block is left."""
    child = subprocess.Popen(
        [sys.executable, "-m", *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    try:
        yield child
    finally:
        assert child.stdin is not None
        with contextlib.suppress(OSError):
            child.stdin.close()
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def heard(child: subprocess.Popen[str]) -> dict[str, Any]:
    """The next line that a process says."""
    assert child.stdout is not None
    line = child.stdout.readline()
    if not line:
        raise SystemExit("a process of the benchmark ended early")
    said: dict[str, Any] = json.loads(line)
    return said


def tell(children: list[subprocess.Popen[str]], word: str) -> None:
    for child in children:
        assert child.stdin is not None
        child.stdin.write(word + "\n")
        child.stdin.flush()


def room(streams: int, rate: float, seconds: float) -> int:
    """Longest context: what the streams may say in the time, with much to spare."""
    most = rate or 1.5e6 / streams
    needed = int(most * (seconds + 10))
    return min(262_144, max(4096, 1 << needed.bit_length()))


def run(
    kind: str, streams: int, args: argparse.Namespace, *, watch: str | None = None, flame: Path | None = None
) -> Figures:
    """watch: "--stages" or "--spread", what the server takes the time of beside its CPU."""
    path, fields = KINDS[kind]
    length = room(streams, args.rate, args.seconds)
    body = {"model": "demo", "stream": True, "ignore_eos": True, "temperature": 0, "max_tokens": MOST_TOKENS} | fields
    server_words = ["bench.front", "--streams", str(streams), "--rate", str(args.rate), "--seconds", str(args.seconds)]
    server_words += ["--max-model-len", str(length)]
    if kind == "logprobs":
        server_words += ["--logprobs", "2"]
    if args.flush_interval_ms is not None:
        server_words += ["--flush-interval-ms", str(args.flush_interval_ms)]
    if watch is not None:
        server_words.append(watch)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(process(*server_words))
        port = heard(server)["port"]
        shares = [len(part) for part in np.array_split(np.arange(streams), min(args.clients, streams))]
        clients = [
            stack.enter_context(process("bench.listening", str(port), str(share), path, json.dumps(body)))
            for share in shares
        ]
        running = heard(server)
        if flame is not None:
            stack.enter_context(flame_graph(running["process"], flame, args.seconds))
        heard(server)
        tell(clients, "begin")
        seen = heard(server)
        tell(clients, "end")
        listened = [heard(client) for client in clients]
        tell([server], "write")
        seen["write"] = heard(server)["seconds"]
        if any(one["ended"] for one in listened):
            raise SystemExit("a stream ended before its time: its context was too short")
    return figures(kind, streams, args.rate, seen, listened)


def figures(kind: str, streams: int, rate: float, seen: dict[str, Any], listened: list[dict[str, Any]]) -> Figures:
    tokens, cpu = max(1.0, seen["tokens"]), seen["cpu"]
    events = sum(one["events"] for one in listened)
    write = min(cpu, seen["write"] * events)
    gaps = np.mean([[1e3 * gap for gap in one["gaps"]] for one in listened], axis=0).tolist() if events else [0.0] * 3
    return Figures(
        kind=kind,
        streams=streams,
        rate=rate,
        tokens_per_second=tokens / seen["wall"],
        tokens_per_core_second=tokens / cpu,
        tokens_per_event=tokens / events if events else 0.0,
        cpu=MICRO * cpu / tokens,
        write=MICRO * write / tokens,
        python=MICRO * (cpu - write) / tokens,
        cpu_per_event=MICRO * cpu / events if events else 0.0,
        utilisation=cpu / seen["wall"],
        gaps_ms=gaps,
        added_ms=gaps[1] - 1e3 / rate if rate and events else None,
        stages={name: MICRO * seconds / tokens for name, seconds in seen.get("stages", {}).items()},
        spread_ms={name: [1e3 * one for one in of] for name, of in seen.get("spread", {}).items()},
    )


@contextlib.contextmanager
def flame_graph(process_id: int, path: Path, seconds: float) -> Iterator[None]:
    """py-spy beside the block, writing an SVG."""
    tool = shutil.which("py-spy") or str(Path(sys.executable).parent / "py-spy")
    words = [tool, "record", "--pid", str(process_id), "--output", str(path), "--duration", str(int(seconds) + 1)]
    try:
        spy = subprocess.Popen([*words, "--rate", "500"], stdout=subprocess.DEVNULL)
    except FileNotFoundError:
        raise SystemExit("--flame needs py-spy (pip install py-spy)") from None
    try:
        yield
        if spy.wait():
            raise SystemExit("py-spy failed; it may need the right to trace processes")
    finally:
        if spy.poll() is None:
            spy.terminate()
            spy.wait()


def print_table(all_figures: list[Figures]) -> None:
    print(
        f"\n{'kind':<12}{'streams':>8}{'tok/s':>9}{'tok/ev':>8}{'cpu/tok':>9}{'write':>8}{'python':>8}{'cpu/ev':>8}"
        f"{'tok/s/core':>12}{'loop':>7}{'gap p50':>9}{'p99':>8}{'added':>8}   "
        + "".join(f"{stage:>11}" for stage in STAGES)
    )
    for one in all_figures:
        added = "-" if one.added_ms is None else f"{one.added_ms:.2f}"
        staged = "".join(f"{one.stages[stage]:>11.2f}" if stage in one.stages else f"{'-':>11}" for stage in STAGES)
        print(
            f"{one.kind:<12}{one.streams:>8}{one.tokens_per_second:>9.0f}{one.tokens_per_event:>8.1f}{one.cpu:>9.2f}"
            f"{one.write:>8.2f}{one.python:>8.2f}{one.cpu_per_event:>8.1f}{one.tokens_per_core_second:>12.0f}"
            f"{one.utilisation:>7.0%}{one.gaps_ms[0]:>9.2f}{one.gaps_ms[1]:>8.2f}{added:>8}   {staged}"
        )
    for one in all_figures:
        if one.spread_ms:
            texts = {name: " / ".join([f"{value:.2f}" for value in of]) for name, of in one.spread_ms.items()}
            print(
                f"{one.kind}, {one.streams} streams, ms at p50 / p99 / most: from step to step {texts.get('steps')}, "
                f"from a step to the end of its writes {texts.get('writing')} (the loop's own CPU of that "
                f"{texts.get('own')}, without a processor or Python's lock {texts.get('waiting')}), from end to end "
                f"{texts.get('ends')}"
            )
    peers = ", ".join(f"{name} {cost:.0f} us" for name, cost in PEERS.items())
    print(f"\nus of the loop thread's CPU a token; gaps in ms. Peers' front ends, one event a token: {peers}.")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.http", description=__doc__)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 64, 256, 1024])
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=["chat"])
    parser.add_argument("--rate", type=float, default=0.0, help="tokens a second of each stream; 0: as fast as may be")
    parser.add_argument("--seconds", type=float, default=3.0, help="measured time of a run (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=1, help="processes that listen (default: %(default)s)")
    parser.add_argument("--flush-interval-ms", type=float, help="the server's; 0 is one event a token (default: auto)")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each, the one of the least CPU is shown")
    parser.add_argument("--no-stages", action="store_true", help="leave out the second run that tells the stages")
    parser.add_argument("--flame", type=Path, help="an SVG by py-spy, of the last run")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    found: list[Figures] = []
    for kind in args.kind:
        for streams in args.streams:
            one = min((run(kind, streams, args) for _ in range(args.repeat)), key=lambda one: one.cpu)
            if not args.no_stages:
                one.stages = run(kind, streams, args, watch="--stages").stages
            if args.rate:
                one.spread_ms = run(kind, streams, args, watch="--spread").spread_ms
            found.append(one)
    if args.flame is not None:
        run(args.kind[-1], args.streams[-1], args, flame=args.flame)
    print_table(found)
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n")


if __name__ == "__main__":
    main()

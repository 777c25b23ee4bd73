"""Two servers, one load, in turns: `python -m bench.compare --b="--disable-overlap" -- --max-concurrency 32 ...`

Both servers are up for the whole run and idle while the other is measured, and rounds alternate A B A B, so that the
ratio holds when the machine's speed drifts. A and B are flags for our own server, or whole commands of a peer
(--a-command, --b-command, with {port}). What follows `--` goes to bench.serve. `python -m bench.compare peers ...` is
bench/peers.py: the same weights behind ours, llama.cpp's server and others.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import peers
from bench.serve import parse, run
from bench.server import Running, running

KEYS = ("output_throughput", "mean_ttft_ms", "mean_tpot_ms", "p99_itl_ms")


def one_round(server: Running, load: Sequence[str], seed: int) -> dict[str, float]:
    """One run of bench.serve; raises RuntimeError when a request failed."""
    options = parse(["--port", str(server.port), "--disable-tqdm", "--seed", str(seed), *load])
    outcome = asyncio.run(run(options))
    if outcome["failed"]:
        raise RuntimeError(f"{outcome['failed']} requests failed")
    return {key: float(outcome[key]) for key in KEYS}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["peers"]:
        return peers.main(words[1:])
    cut = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("--a", default="", metavar="FLAGS", help="flags of server A")
    parser.add_argument("--b", default="", metavar="FLAGS", help="flags of server B")
    parser.add_argument("--a-command", metavar="COMMAND")
    parser.add_argument("--b-command", metavar="COMMAND")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(words[:cut])
    load = words[cut + 1 :]
    rounds: list[tuple[dict[str, float], dict[str, float]]] = []
    with running(args.a, command=args.a_command) as first, running(args.b, command=args.b_command) as second:
        for number in range(args.rounds + 1):
            pair = one_round(first, load, number), one_round(second, load, number)
            if number:  # the first pair warms both up
                rounds.append(pair)
    print(f"A: {args.a_command or args.a or '(defaults)'}\nB: {args.b_command or args.b or '(defaults)'}")
    print(f"{'median of ' + str(args.rounds) + ' rounds':<24}{'A':>12}{'B':>12}{'A / B':>10}{'(min - max)':>18}")
    ratios: dict[str, list[float]] = {}
    for key in KEYS:
        ratios[key] = [a[key] / b[key] for a, b in rounds]
        a, b = (statistics.median(pair[side][key] for pair in rounds) for side in (0, 1))
        spread = f"({min(ratios[key]):.3f} - {max(ratios[key]):.3f})"
        print(f"{key:<24}{a:>12.2f}{b:>12.2f}{statistics.median(ratios[key]):>10.3f}{spread:>18}")
    if args.json:
        args.json.write_text(json.dumps({"command": sys.argv, "rounds": rounds, "ratios": ratios}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())

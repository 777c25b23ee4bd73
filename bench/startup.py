"""From starting the process to the first streamed token: `python -m bench.startup`.

Prints each run: seconds until /health answers, until the first piece of text of a streamed chat has arrived, and what
`import torch` took alone in a process of its own right after, all of it: a server leaves a part out (engine/later.py).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import urllib.request

from bench.server import Running, running


def first_text_seconds(server: Running) -> float:
    """Seconds from sending a streamed chat request to its first text."""
    body = {"stream": True, "max_tokens": 8, "messages": [{"role": "user", "content": "Tell me a story about a fox."}]}
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    begin = time.perf_counter()
    with urllib.request.urlopen(request, timeout=60) as answer:
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            choices = json.loads(line[6:])["choices"]
            if choices and choices[0]["delta"].get("content"):
                return time.perf_counter() - begin
    raise RuntimeError("the stream ended without text")


def import_seconds() -> float:
    """Of a process that imports torch and nothing else."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return time.perf_counter() - begin


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.startup", description=__doc__)
    parser.add_argument("--flags", default="", help="for the server")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args(argv)
    totals, shares = [], []
    for _ in range(args.runs):
        with running(args.flags) as server:
            first = first_text_seconds(server)
            totals.append(server.exec_to_ready_s + first)
        alone = import_seconds()
        shares.append(alone / totals[-1])
        line = f"ready after {server.exec_to_ready_s:.2f} s, first text {first:.2f} s later: {totals[-1]:.2f} s"
        print(f"{line}; importing torch alone {alone:.2f} s", flush=True)
    print(
        f"start to first streamed token: median {statistics.median(totals):.2f} s of {args.runs} runs, "
        f"importing torch alone takes {statistics.median(shares):.2f} times as long"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What the disk tier saves after a restart: `python -m bench.tiers` (a SmolLM2-135M shape, a prompt of 10,000 tokens).

Each round starts a server three times: with an empty directory (cold; it also writes the pages), again with what the
first has left behind, and once more without the tier. Time to first token, and ratios of one round.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import engine.demo
from bench.server import Running, running
from bench.shapes import SHAPES, write_shape

DEMO = Path(engine.demo.__path__[0])


def first_token(server: Running, prompt: list[int]) -> tuple[float, int]:
    """Seconds from sending a completion to its first token, and how many of the prompt's were cached."""
    body = {
        "prompt": prompt,
        "stream": True,
        "max_tokens": 4,
        "temperature": 0,
        "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    begin, first, usage = time.perf_counter(), None, None
    with urllib.request.urlopen(request, timeout=1800) as answer:
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            assert "choices" in chunk, chunk
            if first is None and chunk["choices"]:
                first = time.perf_counter() - begin
            usage = chunk.get("usage") or usage
    assert first is not None and usage is not None
    return first, int((usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0))


def written(server: Running) -> float:
    """Bytes of pages on the disk, once no more come."""
    before = -1.0
    while True:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        now = float(next(line.split()[-1] for line in lines if line.startswith("oneloop_kv_disk_bytes ")))
        if now == before:
            return now
        before = now
        time.sleep(0.5)


def measure(model: Path, args: argparse.Namespace, directory: Path) -> dict[str, float]:
    """One round."""
    prompt = random.Random(time.time_ns()).choices(range(100, 2000), k=args.tokens)
    plain = f"--model {model} --load-format dummy --tokenizer {DEMO} --dtype {args.dtype}"
    plain += f" --max-model-len {args.tokens + 64}"
    disk = f"{plain} --kv-disk {directory} --kv-disk-timeout 60"
    found: dict[str, float] = {}
    with running(disk) as server:
        found["cold"], cached = first_token(server, prompt)
        assert not cached
        found["bytes"] = written(server)
    with running(disk) as server:
        found["restarted"], cached = first_token(server, prompt)
        assert cached > 0.9 * args.tokens, cached
    with running(plain) as server:
        found["without"], cached = first_token(server, prompt)
        assert not cached
    return found


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.tiers", description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="smollm2-135m")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--directory", type=Path, help="on the disk to be measured; default: a temporary one")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        model = write_shape(args.shape, Path(scratch) / "model")
        for number in range(args.rounds):
            with tempfile.TemporaryDirectory(dir=args.directory) as directory:
                row = measure(model, args, Path(directory))
            rows.append(row)
            print(
                f"round {number + 1}: cold {row['cold']:.2f} s, restarted {row['restarted']:.3f} s "
                f"({row['restarted'] / row['cold']:.3f} times), without the tier {row['without']:.2f} s "
                f"(cold is {row['cold'] / row['without']:.2f} times that), {row['bytes'] / 1e6:.0f} MB",
                flush=True,
            )
    ratio = statistics.median(row["restarted"] / row["cold"] for row in rows)
    print(f"first token of {args.tokens} after a restart: {ratio:.3f} times a cold one, median of {len(rows)} rounds")
    if args.json:
        args.json.write_text(json.dumps({"command": sys.argv, "rows": rows}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What a busy event loop costs a step on the processor: `python -m bench.beside --shape llama-3.2-1b --dtype bfloat16`.

Decode steps run in a thread of their own, as they do in the server, while the main thread computes Python for `--share`
of every 5 ms, or sleeps; rounds with and without take turns. With as many compute threads as processors there are the
two share these: a step that waits for arithmetic alone becomes processors / (processors - share) times as long, and one
that waits for memory less.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench.kv import cache_of, metadata_of, step_of
from bench.shapes import SHAPES, write_shape
from engine.executor.cpu_start import available_cores
from engine.models.loading.load import load_model
from engine.models.registry import read_spec

PERIOD = 0.005


def seconds_of(step: Callable[[], float], steps: int, share: float) -> tuple[float, float]:
    """(median seconds of a step, share of the time that this thread computed) while it is busy for that share."""
    times: list[float] = []
    done = threading.Event()

    def work() -> None:
        times.extend(step() for _ in range(steps))
        done.set()

    thread = threading.Thread(target=work)
    begin, own = time.perf_counter(), time.thread_time()
    thread.start()
    while not done.is_set():
        spent = time.thread_time() + share * PERIOD
        next_at = time.perf_counter() + PERIOD
        while time.thread_time() < spent and not done.is_set():
            sum(range(200))
        done.wait(max(next_at - time.perf_counter(), 0))
    busy = (time.thread_time() - own) / (time.perf_counter() - begin)
    thread.join()
    return statistics.median(times), busy


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.beside", description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.2-1b")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=10, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    with tempfile.TemporaryDirectory() as folder:
        write_shape(args.shape, Path(folder))
        model = load_model(
            read_spec(Path(folder)),
            Path(folder),
            dtype=dtype,
            device=torch.device("cpu"),
            load_format="dummy",
            max_model_len=args.context,
        )
        for batch in args.batch:
            given = metadata_of(batch, args.context)
            step = step_of(model, cache_of(model.attention_spec, len(given.kv_indices), dtype, dtype), given)
            seconds_of(step, 2, 0.0)
            ratios, idle, busy = [], [], []
            for _ in range(args.rounds):
                alone, _ = seconds_of(step, args.steps, 0.0)
                beside, share = seconds_of(step, args.steps, args.share)
                idle.append(alone)
                busy.append(share)
                ratios.append(beside / alone)
            print(
                f"{batch:>3} rows, {args.threads} threads on {available_cores()} processors: a step of "
                f"{1e3 * statistics.median(idle):.1f} ms takes {statistics.median(ratios):.2f} times as long "
                f"({min(ratios):.2f} to {max(ratios):.2f}) beside a loop that computes "
                f"{100 * statistics.median(busy):.0f}% of the time"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())

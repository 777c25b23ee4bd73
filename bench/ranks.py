"""What ranks cost and bring on a CPU: N ranks of one thread against one process with N threads, and the ring by itself.

`python -m bench.ranks --shape llama-3.2-1b --batch 16` decodes random weights of a real shape in fresh processes, in
turns, so that a machine that gets slower slows down both. `--ring` measures what telling a step to another process
takes: the writing of its arrays here (which a step pays whoever listens), and the way there and back.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.offline import decode_seconds
from bench.shapes import SHAPES, write_shape
from engine.build import build_engine
from engine.config import CacheOptions, EngineConfig, ModelOptions, SchedulerOptions
from engine.distributed.leader import RankedExecutor


def decode(args: argparse.Namespace, ranks: int) -> dict[str, Any]:
    """Seconds of a step, in this process. waited, added: of them, by rank, until others had arrived, and to add up."""
    with tempfile.TemporaryDirectory() as folder:
        directory = write_shape(args.shape, Path(folder) / "model")
        built = build_engine(
            EngineConfig(
                model=ModelOptions(path=str(directory), dtype=args.dtype, load_format="dummy", max_model_len=1024),
                cache=CacheOptions(num_pages=args.batch * 16, enable_prefix_caching=False),
                scheduler=SchedulerOptions(max_num_seqs=args.batch),
                device="cpu",
                num_threads=args.cores // ranks,
                tensor_parallel_size=ranks,
            )
        )
    rng = np.random.default_rng(0)
    vocabulary = built.model_config.vocab_size
    prompts = rng.integers(0, vocabulary, (args.batch, args.input_len)).tolist()

    executor = built.engine.executor
    group = executor.ranks if isinstance(executor, RankedExecutor) else None

    async def measure() -> dict[str, Any]:
        loop = asyncio.create_task(built.engine.run())
        await decode_seconds(built.engine, prompts, 4)
        before, begin = (np.zeros(1) if group is None else group.spent_ns()), time.perf_counter()
        found: dict[str, Any] = {"seconds": await decode_seconds(built.engine, prompts, args.output_len)}
        if group is not None:
            share = (group.spent_ns() - before) / 1e9 / (time.perf_counter() - begin)
            found["waited"], found["added"] = share.T.tolist()
        loop.cancel()
        await asyncio.wait({loop})
        return found

    try:
        return asyncio.run(measure())
    finally:
        built.engine.executor.close()


def in_turns(args: argparse.Namespace) -> dict[str, Any]:
    """Pairs of processes, one after the other."""
    found: dict[int, list[float]] = {1: [], args.ranks: []}
    communication = []
    for pair in range(args.pairs):
        for ranks in (1, args.ranks) if pair % 2 == 0 else (args.ranks, 1):
            words = [sys.executable, "-m", "bench.ranks", "--only", str(ranks), *args.given]
            done = subprocess.run(words, capture_output=True, text=True, check=True)
            told = json.loads(done.stdout.splitlines()[-1])
            found[ranks].append(told["seconds"])
            line = f"{ranks} rank{'s' if ranks > 1 else ''}: {1000 * told['seconds']:8.2f} ms a step"
            if ranks > 1:
                shares = list(zip(told["waited"], told["added"], strict=True))
                line += "; of the time, by rank, waiting and adding up: "
                line += ", ".join(f"{waited:.1%} + {added:.1%}" for waited, added in shares)
                # Who waits least is who the others wait for.
                communication.append(min(map(sum, shares)))
            print(line, flush=True)
    ratios = [one / several for one, several in zip(found[1], found[args.ranks], strict=True)]
    median = statistics.median(ratios)
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    share = statistics.median(communication)
    print(
        f"{args.ranks} ranks against one with {args.cores} threads: {median:.2f}x ({spread}); communication of "
        f"the rank that waits least: {share:.1%} of a step"
    )
    return {"shape": args.shape, "batch": args.batch, "seconds": found, "ratio": median, "communication": share}


def ring(args: argparse.Namespace) -> dict[str, Any]:
    """Microseconds of telling steps of `batch` decode rows to one other process, which answers each at once."""
    from engine.distributed import messages
    from engine.executor.tables import PagedMetadata
    from engine.ops.ranks import Layout, Ranks

    rows, pages = args.batch, args.input_len // 16 + 1
    ids = np.zeros(rows, np.int32)
    metadata = object.__new__(PagedMetadata)
    metadata.num_rows, metadata.positions = rows, ids
    metadata.kv_len = metadata.last_page_len = ids
    metadata.qo_indptr = metadata.kv_indptr = np.zeros(rows + 1, np.int32)
    metadata.kv_indices, metadata.kv_slots = np.zeros(rows * pages, np.int32), np.zeros(rows, np.int64)
    layout = Layout(2, 1 << 20, 1 << 16)
    file = Ranks.make_file(layout)
    count = args.steps
    child = os.fork()
    if child == 0:
        ranks = Ranks(file, layout, 1)
        for _ in range(count + 2 * (count // 4)):
            messages.read_forward(ranks.receive())
            ranks.arrive()
        os._exit(0)
    ranks = Ranks(file, layout, 0)

    def tell() -> float:
        begin = time.perf_counter()
        messages.write_forward(ranks.next_message(), ids, (metadata,), None)
        ranks.post()
        return time.perf_counter() - begin

    there, both = [], []
    for _ in range(count):
        begin = time.perf_counter()
        there.append(tell())
        ranks.arrive()
        ranks.meet()
        both.append(time.perf_counter() - begin)

    def after(busy: float) -> list[float]:
        """Told after so many seconds of other work, as between the steps of a model."""
        found = []
        for _ in range(count // 4):
            until = time.perf_counter() + busy
            while time.perf_counter() < until:
                pass
            found.append(tell())
            ranks.arrive()
            ranks.meet()
        return found

    # The other one spins, yields, and sleeps by then.
    between, asleep = after(0.001), after(0.004)
    os.waitpid(child, 0)
    row = {
        name: 1e6 * statistics.median(values)
        for name, values in (
            ("tell_us", there),
            ("tell_between_us", between),
            ("tell_sleeper_us", asleep),
            ("there_and_back_us", both),
        )
    }
    print(
        f"a step of {rows} rows: {row['tell_us']:.1f} us to tell ({row['tell_between_us']:.1f} us after 1 ms of other "
        f"work, {row['tell_sleeper_us']:.1f} us to one that sleeps), {row['there_and_back_us']:.1f} us there and back"
    )
    return row


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-1b")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--cores", type=int, default=2, help="threads of one process, and of all ranks together")
    parser.add_argument("--input-len", type=int, default=32)
    parser.add_argument("--output-len", type=int, default=24)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--ring", action="store_true")
    parser.add_argument("--steps", type=int, default=2000, help="of the ring's measurement")
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="where results go")
    args = parser.parse_args(argv)
    args.given = list(sys.argv[1:] if argv is None else argv)
    if args.only is not None:
        print(json.dumps(decode(args, args.only)))
        return 0
    result = ring(args) if args.ring else in_turns(args)
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())

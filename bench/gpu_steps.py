"""Where the time of decode steps goes on a GPU; `python -m bench.gpu_steps --model llama-3.2-1b --batch 1 64`.

For every batch size: steps as the loop sees them (a stall shows as a maximum), kernels by the time that they take of a
step, a stretch of them in the order of time, which shows gaps, and with --host the functions of the loop thread. Random
weights of real shapes. torch's profiler slows small steps down: rates are bench.gpu's.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import cProfile
import io
import itertools
import pstats
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from bench import gpu
from bench.shapes import SHAPES
from engine.config import StartupError
from engine.executor.cuda import CUDAExecutor
from engine.executor.cuda_kit import use_kit_of_build
from engine.forward import ForwardInput
from engine.process import settle

# Steps of the whole batch that pass before the profiler looks, and those that it looks at.
FIRST, STEPS = 40, 20
# Kernels of a table, and of a stretch in the order of time.
SHOWN, STRETCH = 16, 24


class Kernel(NamedTuple):
    """A launch on the device; begin and seconds in microseconds."""

    name: str
    begin: float
    took: float


def by_time(kernels: Sequence[Kernel], steps: int) -> list[str]:
    """A line a kernel: microseconds of a step, launches in it, microseconds of one."""
    found: dict[str, list[float]] = defaultdict(list)
    for kernel in kernels:
        found[kernel.name].append(kernel.took)
    order = sorted(found, key=lambda name: -sum(found[name]))
    busy = sum(kernel.took for kernel in kernels) / steps
    lines = [f"kernels {busy:.0f} us a step, {len(kernels) / steps:.0f} launches (those that overlap count twice)"]
    for name in order[:SHOWN]:
        took = found[name]
        lines.append(f"{sum(took) / steps:9.1f} us {len(took) / steps:6.1f}x {np.mean(took):8.2f} us  {name[:100]}")
    return lines


def in_order(kernels: Sequence[Kernel]) -> list[str]:
    """A line a kernel of a stretch in the middle: when it began, how long it took."""
    order = sorted(kernels, key=lambda kernel: kernel.begin)
    stretch = order[len(order) // 2 :][:STRETCH]
    return [f"{each.begin - stretch[0].begin:9.1f} +{each.took:7.1f}  {each.name[:100]}" for each in stretch]


def as_seen(steps: Sequence[tuple[float, float, int, bool, int]], batch: int) -> str:
    """Of steps of the whole batch: how long they took, and how long the host worked for them."""
    whole = [
        (later[1] - earlier[1], later[0] - earlier[1])
        for earlier, later in itertools.pairwise(steps)
        if earlier[2:4] == later[2:4] == (batch, True)
    ]
    if not whole:
        return "no step of the whole batch"
    took, host = 1e6 * np.array(whole).T
    parts = [
        f"{name} {np.mean(values):.0f} us (median {np.median(values):.0f}, most {np.max(values):.0f})"
        for name, values in (("step", took), ("of it the host", host))
    ]
    return f"{', '.join(parts)}; {len(whole)} steps"


@contextlib.contextmanager
def profiled(executor: CUDAExecutor, batch: int) -> Iterator[list[Kernel]]:
    """What STEPS steps of the whole batch launch on the device, from the FIRST such step on."""
    from torch.profiler import ProfilerActivity, profile

    profiler: Any = profile(activities=[ProfilerActivity.CUDA])
    submit, seen, found = executor.submit, 0, list[Kernel]()

    def watching(step: ForwardInput) -> Any:
        nonlocal seen
        if step.num_decode_rows == step.num_rows == batch:
            seen += 1
            if seen in (FIRST, FIRST + STEPS):
                with executor.layer.may_block():
                    torch.cuda.synchronize()
                    profiler.start() if seen == FIRST else profiler.stop()
        return submit(step)

    executor.submit = watching  # type: ignore[method-assign, assignment]
    try:
        yield found
    finally:
        executor.submit = submit  # type: ignore[method-assign]
    for event in profiler.events() if seen >= FIRST + STEPS else ():
        if event.device_type.name == "CUDA":
            span = event.time_range
            found.append(Kernel(event.name, span.start, span.end - span.start))


def look(subject: gpu.Subject, executor: CUDAExecutor, batch: int, *, host: bool) -> list[str]:
    """All that is said of a batch size."""
    prompts = subject.prompts(batch, subject.context)

    async def run() -> None:
        async with gpu.running(subject, executor, True) as engine:
            await gpu.answer(engine, prompts, subject.decode_tokens)

    watch = gpu.Watch(executor)
    asyncio.run(run())  # captures graphs
    watch.steps.clear()
    asyncio.run(run())
    watch.remove()
    lines = [f"## {subject.name}, {batch} rows of {subject.context} tokens", as_seen(watch.steps, batch)]
    if torch.cuda.is_available():
        with profiled(executor, batch) as kernels:
            asyncio.run(run())
        lines += [*by_time(kernels, STEPS), *in_order(kernels)]
    if host:
        profiler, out = cProfile.Profile(), io.StringIO()
        profiler.enable()
        asyncio.run(run())
        profiler.disable()
        pstats.Stats(profiler, stream=out).sort_stats("tottime").print_stats(SHOWN)
        lines += [line for line in out.getvalue().splitlines() if line.strip()]
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_steps", description=__doc__)
    parser.add_argument("--model", choices=sorted(SHAPES), default="llama-3.2-1b", metavar="SHAPE")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--context", type=int, default=gpu.CONTEXT)
    parser.add_argument("--kv-cache-dtype", choices=("auto", "fp8"), default="auto")
    parser.add_argument("--host", action="store_true", help="also functions of the loop thread")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench.gpu_steps needs an NVIDIA GPU", file=sys.stderr)
        return 1
    try:
        use_kit_of_build()
    except StartupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    # A whole batch decodes for so many steps, though its prompts come in over some.
    tokens = 2 * (FIRST + STEPS) + max(args.batch) // 4
    options: dict[str, Any] = {"context": args.context, "decode_tokens": tokens, "kv_cache_dtype": args.kv_cache_dtype}
    layer = gpu.TimedDevice()
    subject = gpu.Subject(
        args.model, SHAPES[args.model], layer, torch.bfloat16, max_num_seqs=max(args.batch), **options
    )
    with layer.may_block():
        executor = subject.executor()
    settle()
    for batch in args.batch:
        print("\n".join(look(subject, executor, batch, host=args.host)), flush=True)
    executor.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())

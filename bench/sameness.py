"""How far a request's numbers depend on what runs beside it, and the price of their not doing so.

`python -m bench.sameness`. Flips: about 10k tokens of the model's own text are scored twice, each sequence alone and
token by token (as it would be decoded), then all together in mixed chunks; a flip is a place where the most probable
token differs. Per mode: what the machine does by itself, --deterministic, and torch's kernels alone (a machine
without a compiler). Cost: decode steps with and without --deterministic, in turns within one run, as a ratio.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from bench.offline import decode_seconds
from bench.shapes import SHAPES, write_shape
from engine.build import Built, build_engine
from engine.config import CacheOptions, EngineConfig, ModelOptions, SchedulerOptions, StartupError
from engine.engine import Engine
from engine.flags import DEMO_MODEL
from engine.request import Request, SamplingParams
from engine.stream import TokenLogprob

MODES = {"default": False, "deterministic": True, "torch": False}
SEQUENCES = 64
# Of a step in which the sequences meet: no multiple of anything, so that chunks end anywhere.
MIXED_BUDGET = 101


@dataclass
class Flips:
    """One mode. places: scored tokens. largest: absolute difference of one token's log-probability."""

    mode: str
    promised: str
    places: int
    flips: int
    rate: float
    changed: int
    largest: float


def build(args: argparse.Namespace, directory: str, *, deterministic: bool, budget: int = 2048) -> Built:
    return build_engine(
        EngineConfig(
            model=ModelOptions(path=directory, dtype=args.dtype, load_format="dummy" if args.shape else "auto"),
            cache=CacheOptions(num_pages=args.pages, enable_prefix_caching=False),
            scheduler=SchedulerOptions(max_num_seqs=min(SEQUENCES, budget), max_num_batched_tokens=budget),
            device="cpu",
            num_threads=args.threads,
            deterministic=deterministic,
        )
    )


@asynccontextmanager
async def running(built: Built) -> AsyncIterator[Engine]:
    task = asyncio.create_task(built.engine.run())
    try:
        yield built.engine
    finally:
        task.cancel()
        await asyncio.wait({task})
        built.engine.executor.close()


async def write_texts(built: Built, tokens: int, seed: int) -> list[list[int]]:
    """SEQUENCES sampled continuations of one random token each; about `tokens` in all."""
    generator = np.random.default_rng(seed)
    async with running(built) as engine:

        async def one(index: int) -> list[int]:
            prompt = [int(generator.integers(3, engine.limits.vocab_size))]
            params = SamplingParams(max_tokens=-(-tokens // SEQUENCES), temperature=0.8, seed=index, ignore_eos=True)
            async with engine.submit(Request(f"text-{index}", prompt, params, stream=False)) as stream:
                return prompt + (await stream.collect()).token_ids

        return list(await asyncio.gather(*map(one, range(SEQUENCES))))


async def score(built: Built, texts: list[list[int]], *, together: bool) -> list[list[TokenLogprob]]:
    """The log-probability of every token after the first, with the most probable one."""
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1)
    async with running(built) as engine:

        async def one(index: int) -> list[TokenLogprob]:
            async with engine.submit(Request(f"score-{index}", texts[index], params, stream=False)) as stream:
                await stream.collect()
            assert stream.prompt_logprobs is not None
            return stream.prompt_logprobs

        if together:
            return list(await asyncio.gather(*map(one, range(len(texts)))))
        return [await one(index) for index in range(len(texts))]


def without_kernels(mode: str) -> contextlib.AbstractContextManager[None]:
    from engine.ops import native

    return native.disabled() if mode == "torch" else contextlib.nullcontext()


def measure_flips(args: argparse.Namespace, directory: str, mode: str, texts: list[list[int]]) -> Flips:
    with without_kernels(mode):
        first = build(args, directory, deterministic=MODES[mode], budget=1)
        promised = dict(first.report.rows)["deterministic"]
        alone = asyncio.run(score(first, texts, together=False))
        second = build(args, directory, deterministic=MODES[mode], budget=MIXED_BUDGET)
        mixed = asyncio.run(score(second, texts, together=True))
    pairs = [pair for one, other in zip(alone, mixed, strict=True) for pair in zip(one, other, strict=True)]
    flips = sum(one.top[0][0] != other.top[0][0] for one, other in pairs)
    differences = [abs(one.logprob - other.logprob) for one, other in pairs]
    changed = sum(difference > 0 for difference in differences)
    return Flips(mode, promised, len(pairs), flips, flips / len(pairs), changed, max(differences))


async def measure_cost(args: argparse.Namespace, directory: str) -> dict[str, float]:
    """Milliseconds of a decode step at args.batch with and without, and the median ratio of neighbouring rounds."""
    generator = np.random.default_rng(0)
    times: dict[bool, list[float]] = {False: [], True: []}
    async with contextlib.AsyncExitStack() as stack:
        engines = {
            flag: await stack.enter_async_context(running(build(args, directory, deterministic=flag)))
            for flag in (False, True)
        }
        for number in range(args.repeat + 1):
            shape = (args.batch, args.input_len)
            prompts = generator.integers(3, engines[True].limits.vocab_size, shape).tolist()
            for flag in (False, True) if number % 2 else (True, False):
                seconds = await decode_seconds(engines[flag], prompts, args.output_len)
                if number:  # the first round warms up
                    times[flag].append(seconds)
    ratios = np.array(times[True]) / np.array(times[False])
    return {
        "fast_ms": 1e3 * float(np.median(times[False])),
        "deterministic_ms": 1e3 * float(np.median(times[True])),
        "ratio": float(np.median(ratios)),
    }


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.sameness", description=__doc__)
    parser.add_argument("--model", default=str(DEMO_MODEL), help="a model directory (the demo model)")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="random weights of a well-known shape instead")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--tokens", type=int, default=10_000, help="to score; 0 leaves the flips out")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=7, help="rounds of the cost; 0 leaves it out")
    parser.add_argument("--pages", type=int, default=2048)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    report: dict[str, object] = {"command": sys.argv, "dtype": args.dtype}
    with tempfile.TemporaryDirectory() as folder:
        directory = str(write_shape(args.shape, Path(folder))) if args.shape else args.model
        try:
            if args.tokens:
                texts = asyncio.run(write_texts(build(args, directory, deterministic=False), args.tokens, 0))
                rows = []
                for mode in args.modes:
                    row = measure_flips(args, directory, mode, texts)
                    rows.append(asdict(row))
                    print(
                        f"{mode:<14} top-1 flips {row.flips} of {row.places} ({100 * row.rate:.3f}%), "
                        f"log-probabilities changed {row.changed}, by {row.largest:.2g} at most; "
                        f"deterministic: {row.promised}",
                        flush=True,
                    )
                report["flips"] = rows
            if args.repeat:
                cost = asyncio.run(measure_cost(args, directory))
                report["cost"] = cost
                print(
                    f"decode, batch {args.batch}: {cost['fast_ms']:.2f} ms a step, "
                    f"with --deterministic {cost['deterministic_ms']:.2f} ms: ratio {cost['ratio']:.3f}"
                )
        except StartupError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    if args.json:
        args.json.write_text(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Prompts in, tokens per second out: the whole engine without HTTP, beside the machine's limits of the same run.

`python -m bench.offline --shape llama-3.2-1b --dtype bfloat16 --batch 1 16` loads random weights of a real shape.
Decode is compared with the time to read weights and KV once, and with the roofline (that, or the multiplications at the
GEMM rate, whichever takes longer); prefill with the GEMM rate. Limits are measured after the model has run, on the
same threads, because these figures drift from minute to minute.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import math
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from bench.shapes import SHAPES, write_shape
from engine.build import Built, build_engine
from engine.config import CacheOptions, EngineConfig, ModelOptions, SchedulerOptions, StreamOptions
from engine.engine import Engine
from engine.models.spec import ModelSpec
from engine.request import Request, SamplingParams

GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)


def layer_bytes(config: ModelSpec, itemsize: int) -> float:
    """Bytes of weights that one decode step reads: all layers and the output head; of the embedding only rows."""
    head = config.vocab_size * config.hidden_size
    other = head if not config.tie_word_embeddings else 0
    return float((config.num_parameters - other) * itemsize)


def kv_bytes(config: ModelSpec, itemsize: int, tokens: int) -> float:
    """Bytes of keys and values of `tokens` tokens."""
    return float(2 * len(config.paged) * config.num_kv_heads * config.head_dim * itemsize * tokens)


def states_bytes(config: ModelSpec, itemsize: int, sequences: int) -> float:
    """Bytes of recurrent states that one decode step reads and writes."""
    tensors = [tensor for layer in config.states for tensor in layer]
    each = sum(math.prod(tensor.shape) * (4 if tensor.wide else itemsize) for tensor in tensors)
    return float(2 * each * sequences)


async def decode_seconds(
    engine: Engine, prompts: list[list[int]], output_len: int, params: SamplingParams = GREEDY
) -> float:
    """Seconds per decode step while all prompts decode together (medians would hide a stall, so it is the mean)."""
    counts = [0] * len(prompts)
    began = total_at_begin = 0.0
    ended = total_at_end = 0.0

    async def consume(index: int, prompt: list[int]) -> None:
        nonlocal began, total_at_begin, ended, total_at_end
        own = dataclasses.replace(params, max_tokens=output_len)
        async with engine.submit(Request(f"bench-{index}-{time.monotonic_ns()}", prompt, own)) as stream:
            async for delta in stream:
                counts[index] += len(delta.token_ids)
                if not began and min(counts) >= 2:
                    began, total_at_begin = time.perf_counter(), sum(counts)
                if delta.finish_reason is not None and not ended:
                    ended, total_at_end = time.perf_counter(), sum(counts)

    await asyncio.gather(*(consume(index, prompt) for index, prompt in enumerate(prompts)))
    return (ended - began) * len(prompts) / (total_at_end - total_at_begin)


async def prefill_seconds(engine: Engine, prompt: list[int]) -> float:
    """Seconds from submit to the first token."""
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    begin = time.perf_counter()
    async with engine.submit(Request(f"prefill-{time.monotonic_ns()}", prompt, params)) as stream:
        await stream.collect()
    return time.perf_counter() - begin


def show(row: dict[str, object]) -> None:
    """One line as soon as it is known: large shapes take minutes."""
    limit = row.get("of_bandwidth_limit", row.get("of_gemm_rate"))
    name = "of the bandwidth limit" if "of_bandwidth_limit" in row else "of the GEMM rate"
    print(
        f"{row['name']:<8} batch {row['batch']:>3}: {row['ms_per_step']:9.2f} ms, "
        f"{row['tokens_per_s']:9.1f} tok/s, {100 * float(str(limit)):5.1f}% {name}"
        + (f", {100 * float(str(row['of_roofline'])):5.1f}% of the roofline" if "of_roofline" in row else ""),
        flush=True,
    )


async def measure(built: Built, args: argparse.Namespace) -> list[dict[str, object]]:
    from bench.cpu import gemm_rate, read_bandwidth

    engine, config = built.engine, built.model_config
    rng = np.random.default_rng(args.seed)
    loop_task = asyncio.create_task(engine.run())
    import torch

    threads = torch.get_num_threads()
    dtype = getattr(torch, args.dtype)
    itemsize = dtype.itemsize

    def prompts(count: int) -> list[list[int]]:
        return rng.integers(0, config.vocab_size, (count, args.input_len)).tolist()  # type: ignore[no-any-return]

    rows: list[dict[str, object]] = []
    await prefill_seconds(engine, prompts(1)[0][:64])
    for batch in args.batch:
        times, of_bandwidth, of_roofline = [], [], []
        for _ in range(args.repeat):
            seconds = await decode_seconds(engine, prompts(batch), args.output_len)
            context = args.input_len + args.output_len / 2
            moved = layer_bytes(config, itemsize) + kv_bytes(config, itemsize, int(batch * context))
            moved += states_bytes(config, itemsize, batch)
            reading = moved / read_bandwidth(threads)
            # Where bf16 arithmetic is missing, a few rows are enough to make the multiplications the limit.
            rate = max(gemm_rate(dtype, threads), gemm_rate(torch.float32, threads))
            computing = 2 * batch * layer_bytes(config, 1) / rate
            times.append(seconds)
            of_bandwidth.append(reading / seconds)
            of_roofline.append(max(reading, computing) / seconds)
        rows.append(
            {
                "name": "decode",
                "batch": batch,
                "ms_per_step": 1e3 * float(np.median(times)),
                "tokens_per_s": batch / float(np.median(times)),
                "of_bandwidth_limit": float(np.median(of_bandwidth)),
                "of_roofline": float(np.median(of_roofline)),
            }
        )
        show(rows[-1])
    times, ratios = [], []
    body = config.num_parameters - config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    for _ in range(args.repeat):
        seconds = await prefill_seconds(engine, prompts(1)[0])
        attention = 2 * len(config.paged) * config.num_heads * config.head_dim * args.input_len**2
        flops = 2.0 * body * args.input_len + attention
        times.append(seconds)
        # Not every CPU has bf16 arithmetic; float32 is then the better limit.
        rate = max(gemm_rate(dtype, threads), gemm_rate(torch.float32, threads))
        ratios.append(flops / seconds / rate)
    rows.append(
        {
            "name": "prefill",
            "batch": 1,
            "ms_per_step": 1e3 * float(np.median(times)),
            "tokens_per_s": args.input_len / float(np.median(times)),
            "of_gemm_rate": float(np.median(ratios)),
        }
    )
    show(rows[-1])
    loop_task.cancel()
    engine.executor.close()
    return rows


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.offline", description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), help="random weights of a well-known shape")
    parser.add_argument("--model", help="a model directory instead")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--input-len", type=int, default=512)
    parser.add_argument("--output-len", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--disable-overlap", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    if bool(args.shape) == bool(args.model):
        parser.error("give one of --shape and --model")
    with tempfile.TemporaryDirectory() as scratch:
        path = args.model or str(write_shape(args.shape, Path(scratch) / args.shape))
        length = args.input_len + args.output_len + 1
        config = EngineConfig(
            model=ModelOptions(
                path=path, dtype=args.dtype, load_format="dummy" if args.shape else "auto", max_model_len=length
            ),
            cache=CacheOptions(num_pages=(max(args.batch) + 2) * -(-length // 16), enable_prefix_caching=False),
            scheduler=SchedulerOptions(max_num_seqs=max(args.batch), overlap=not args.disable_overlap),
            stream=StreamOptions(flush_interval_ms=0.0),
            device="cpu",
            num_threads=args.threads,
        )
        built = build_engine(config)
    print(built.report.table(), file=sys.stderr)
    rows = asyncio.run(measure(built, args))
    if args.json:
        args.json.write_text(json.dumps({"command": sys.argv, "rows": rows}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())

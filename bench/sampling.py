"""What sampling extras cost: `python -m bench.sampling`, 64 rows of the Llama-1B shape with all of them on.

First the sampler alone on random logits, plain and with extras. Then whole decode steps of the engine with random
weights, plain and with extras by turns in one run (`--no-model` leaves that out): the promise is at most 15% more.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from bench.offline import decode_seconds
from bench.shapes import SHAPES, write_shape
from engine.build import build_engine
from engine.config import CacheOptions, EngineConfig, ModelOptions, SchedulerOptions, StreamOptions
from engine.engine import Engine
from engine.forward import SAMPLING_DTYPE, ForwardInput, Limits, RowExtras, Staging
from engine.ops.sampling.extras import SlotExtras
from engine.ops.sampling.sampler import sample
from engine.request import SamplingParams

Rows = dict[str, object]


def everything(rng: np.random.Generator, vocab: int, output_len: int) -> SamplingParams:
    """A request that asks for every extra there is."""
    ids = rng.permutation(vocab)
    return SamplingParams(
        max_tokens=output_len,
        temperature=1.0,
        ignore_eos=True,
        presence_penalty=0.5,
        frequency_penalty=0.5,
        repetition_penalty=1.1,
        logit_bias=tuple((int(token), 1.0) for token in ids[:50]),
        bad_words=tuple((int(token),) for token in ids[50:60]) + tuple((int(i), int(i) + 1) for i in ids[60:70] % 1000),
        allowed_token_ids=tuple(ids[: vocab // 2].tolist()),
        logprobs=20,
    )


def extras_of(slot: int, history: list[int], params: SamplingParams) -> RowExtras:
    names = "presence_penalty frequency_penalty repetition_penalty logit_bias allowed_token_ids bad_words logprobs"
    fields = {name: getattr(params, name) for name in (*names.split(), "prompt_logprobs")}
    return RowExtras(slot, np.array(history, np.int32), len(history), **fields)


def sampler_alone(rows: int, vocab: int, context: int, repeat: int, rng: np.random.Generator) -> Rows:
    """Milliseconds for a step's sampling, best of `repeat` by turns."""
    limits = Limits(rows, max(rows, 64), context + 64, 16, 64, vocab)
    extras, staging = SlotExtras(limits), Staging(limits)
    slots = np.arange(1, rows + 1, dtype=np.int32)
    histories = rng.integers(0, vocab, (rows, context))
    params = everything(rng, vocab, repeat)
    staging.sampling_slot[:rows] = slots
    asked = [extras_of(slot, histories[slot - 1].tolist(), params) for slot in slots.tolist()]
    extras.apply(ForwardInput(0, staging, 0, 0, 0, 0, rows, asked))
    table = np.zeros(rows, SAMPLING_DTYPE)
    table["temperature"] = table["top_p"] = 1.0
    table["seed"] = np.arange(rows)
    logits = torch.from_numpy((3 * rng.standard_normal((rows, vocab))).astype(np.float32))
    plain, full = [], []
    for turn in range(repeat):
        at = np.full(rows, context + turn, np.int32)
        begin = time.perf_counter()
        sample(logits, table, at)
        middle = time.perf_counter()
        # As log-probabilities are wanted, the logits are afterwards what they were.
        draw = extras.begin(logits, slots, at, table)
        assert draw is not None
        extras.end(draw, sample(draw.logits, table, at), slots)
        plain.append(middle - begin)
        full.append(time.perf_counter() - middle)
    return {"name": "sampler", "plain_ms": 1e3 * min(plain), "extras_ms": 1e3 * min(full)}


async def whole_steps(engine: Engine, args: argparse.Namespace, vocab: int, rng: np.random.Generator) -> Rows:
    running = asyncio.create_task(engine.run())
    plain = SamplingParams(temperature=1.0, ignore_eos=True)
    seconds: dict[str, list[float]] = {"plain": [], "extras": []}
    for turn in range(args.repeat):
        prompts = rng.integers(0, vocab, (args.batch, args.input_len)).tolist()
        full = everything(rng, vocab, args.output_len)
        # The first of a pair now and then: a machine that gets slower would favour it.
        for name, params in ([("plain", plain), ("extras", full)])[:: -1 if turn % 2 else 1]:
            seconds[name].append(await decode_seconds(engine, prompts, args.output_len, params))
    running.cancel()
    await asyncio.wait({running})
    engine.executor.close()
    best = {name: 1e3 * min(values) for name, values in seconds.items()}
    ratios = [full / bare for full, bare in zip(seconds["extras"], seconds["plain"], strict=True)]
    return {
        "name": "step",
        "plain_ms": best["plain"],
        "extras_ms": best["extras"],
        "ratios": ratios,
    }


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.sampling", description=__doc__)
    parser.add_argument("--shape", default="llama-3.2-1b", choices=sorted(SHAPES))
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--input-len", type=int, default=128)
    # Fewer would be seen in a few lumps where the loop shares its cores with the compute threads.
    parser.add_argument("--output-len", type=int, default=40)
    parser.add_argument("--repeat", type=int, default=3, help="turns of whole steps; the sampler alone takes ten times")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-model", action="store_true", help="the sampler alone")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    rng = np.random.default_rng(args.seed)
    vocab = int(str(SHAPES[args.shape]["vocab_size"]))
    if args.threads:
        torch.set_num_threads(args.threads)
    with torch.inference_mode():
        rows = [sampler_alone(args.batch, vocab, args.input_len, 10 * args.repeat, rng)]
    if not args.no_model:
        with tempfile.TemporaryDirectory() as scratch:
            length = args.input_len + args.output_len + 1
            config = EngineConfig(
                model=ModelOptions(
                    path=str(write_shape(args.shape, Path(scratch) / args.shape)),
                    dtype=args.dtype,
                    load_format="dummy",
                    max_model_len=length,
                ),
                cache=CacheOptions(num_pages=(args.batch + 2) * -(-length // 16), enable_prefix_caching=False),
                scheduler=SchedulerOptions(max_num_seqs=args.batch),
                stream=StreamOptions(flush_interval_ms=0.0),
                device="cpu",
                num_threads=args.threads,
            )
            built = build_engine(config)
        rows.append(asyncio.run(whole_steps(built.engine, args, vocab, rng)))
    for row in rows:
        plain, full = float(str(row["plain_ms"])), float(str(row["extras_ms"]))
        print(f"{row['name']:<8} plain {plain:8.2f} ms, with extras {full:8.2f} ms (+{full - plain:.2f})")
    if len(rows) > 1:
        extra = float(str(rows[0]["extras_ms"])) - float(str(rows[0]["plain_ms"]))
        step = float(str(rows[1]["plain_ms"]))
        ratios: list[float] = rows[1]["ratios"]  # type: ignore[assignment]
        turns = ", ".join(f"{100 * (ratio - 1):+.1f}%" for ratio in ratios)
        print(
            f"a step gets {100 * extra / step:.1f}% longer by the sampler's own time; whole steps by turns: {turns} "
            f"(median {100 * (float(np.median(ratios)) - 1):+.1f}%)"
        )
    if args.json:
        args.json.write_text(json.dumps({"command": sys.argv, "rows": rows}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())

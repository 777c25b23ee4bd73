"""What keys and values in eight bits take and cost: `python -m bench.kv --shape llama-3.2-1b --dtype bfloat16`.

A decode step of `--batch` rows of `--context` tokens, with the cache in the model's dtype, in bfloat16 and in int8, in
turns and on one model, so that a busy machine slows all alike. The cache is filled with the same bytes: what a step
costs does not depend on them, and a prompt of that length would take minutes. What int8 does to the answers:
`python -m bench.perplexity --kv-cache-dtype int8 --against SAME`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from bench.shapes import SHAPES, write_shape
from engine.config import StartupError
from engine.executor.tables import PagedMetadata
from engine.forward import Limits
from engine.models.hub import resolve
from engine.models.loading.load import load_model
from engine.models.parts.decoder import CausalLM
from engine.models.registry import read_spec
from engine.ops.attention.base import AttentionSpec
from engine.ops.attention.torch_paged import Backend

PAGE_SIZE = 16


def metadata_of(batch: int, context: int) -> PagedMetadata:
    """Rows that continue by their last token, over shuffled pages."""
    pages = -(-context // PAGE_SIZE)
    given = PagedMetadata(Limits(batch, batch, context, PAGE_SIZE, batch * pages, 1))
    rows = np.arange(batch + 1, dtype=np.int32)
    given.num_rows, given.qo_indptr, given.kv_indptr = batch, rows, rows * pages
    given.kv_indices = (np.random.default_rng(0).permutation(batch * pages) + 1).astype(np.int32)
    given.kv_len = np.full(batch, context, np.int32)
    given.last_page_len = given.kv_len - (pages - 1) * PAGE_SIZE
    given.positions = given.kv_len - 1
    last = given.kv_indices.reshape(batch, pages)[:, -1].astype(np.int64)
    given.kv_slots = last * PAGE_SIZE + given.positions % PAGE_SIZE
    return given


def cache_of(spec: AttentionSpec, pages: int, dtype: torch.dtype, kv_dtype: torch.dtype) -> Backend:
    """Filled: memory that was never written costs nothing to read."""
    backend = Backend(spec, num_pages=pages, page_size=PAGE_SIZE, dtype=dtype, kv_dtype=kv_dtype)
    for pool in (*backend.k_pools, *backend.v_pools):
        # As bits: small floats, or small codes and scales.
        pool.view(torch.uint8).fill_(0x3C)
    return backend


def step_of(model: CausalLM, backend: Backend, given: PagedMetadata) -> Callable[[], float]:
    """Seconds of one step, logits included."""
    ids = torch.zeros(given.num_rows, dtype=torch.int32)
    positions = torch.from_numpy(given.positions)

    def run() -> float:
        begin = time.perf_counter()
        with torch.inference_mode():
            backend.plan(given)
            model.logits(model.forward(ids, positions, backend))
        return time.perf_counter() - begin

    return run


def measure(args: argparse.Namespace, directory: Path) -> None:
    torch.set_num_threads(args.threads)
    spec, model_dtype = read_spec(directory), getattr(torch, args.dtype)
    load_format = "dummy" if args.model is None else "auto"

    def load(dtype: torch.dtype) -> CausalLM:
        cpu = torch.device("cpu")
        return load_model(spec, directory, dtype=dtype, device=cpu, load_format=load_format, max_model_len=args.context)

    given = metadata_of(args.batch, args.context)
    pages = len(given.kv_indices)
    steps: dict[str, Callable[[], float]] = {}
    taken: dict[str, int] = {}
    model = load(model_dtype)
    attention = model.attention_spec
    kinds = dict.fromkeys(((model_dtype, model_dtype), (torch.bfloat16, torch.bfloat16), (model_dtype, torch.int8)))
    for dtype, kv_dtype in kinds:
        name = str(kv_dtype).removeprefix("torch.")
        own = model if dtype == model_dtype else load(dtype)
        steps[name] = step_of(own, cache_of(attention, pages, dtype, kv_dtype), given)
        taken[name] = attention.kv_bytes_per_token(kv_dtype)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(args.repeat + 1):
        for name, step in steps.items():
            seconds = step()
            if turn:
                times[name].append(seconds)
    for name, values in times.items():
        against = statistics.median(own / base for own, base in zip(values, times["bfloat16"], strict=True))
        print(
            f"{name:<9} {taken[name]:>8,} bytes a token, {taken['bfloat16'] / taken[name]:.2f} times the tokens of "
            f"bfloat16; a step of {args.batch} rows of {args.context:,} tokens {1e3 * statistics.median(values):8.1f} "
            f"ms, {against:.2f} times bfloat16's"
        )


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.kv", description=__doc__)
    parser.add_argument("--model", help="a model directory, GGUF file or hub id; else random weights of --shape")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.2-1b")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args(argv)
    try:
        if args.model is not None:
            measure(args, resolve(args.model, None, None))
        else:
            with tempfile.TemporaryDirectory() as folder:
                write_shape(args.shape, Path(folder))
                measure(args, Path(folder))
    except StartupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What keys and values of fewer bits take and cost: `python -m bench.kv --shape llama-3.2-1b --dtype bfloat16`.

A decode step of `--batch` rows of `--context` tokens, with the cache in the model's dtype and in `--kinds`, in turns
and on one model, so that a busy machine slows all alike. The cache is filled with the same bytes: what a step costs
does not depend on them, and a prompt of that length would take minutes. What fewer bits do to the answers:
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
KINDS = ("bfloat16", "float16", "int8")


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

    given = metadata_of(args.batch, args.context)
    pages = len(given.kv_indices)
    steps: dict[str, Callable[[], float]] = {}
    taken: dict[str, int] = {}
    model = load_model(
        *(spec, directory),
        dtype=model_dtype,
        device=torch.device("cpu"),
        load_format=load_format,
        max_model_len=args.context,
        packed_input_bits=args.packed_input_bits,
    )
    attention = model.attention_spec
    for name in dict.fromkeys((args.dtype, *args.kinds)):
        kv_dtype = getattr(torch, name)
        steps[name] = step_of(model, cache_of(attention, pages, model_dtype, kv_dtype), given)
        taken[name] = attention.kv_bytes_per_token(kv_dtype)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(args.repeat + 1):
        for name, step in steps.items():
            seconds = step()
            if turn:
                times[name].append(seconds)
    for name, values in times.items():
        line = f"{name:<9} {taken[name]:>8,} bytes a token; a step of {args.batch} rows of {args.context:,} tokens "
        line += f"{1e3 * statistics.median(values):8.1f} ms"
        for base in ("float32", "bfloat16"):
            if base in times and base != name:
                ratio = statistics.median(own / other for own, other in zip(values, times[base], strict=True))
                line += f"; {taken[base] / taken[name]:.2f} times the tokens, {ratio:.2f} times the step of {base}"
        print(line)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.kv", description=__doc__)
    parser.add_argument("--model", help="a model directory, GGUF file or hub id; else random weights of --shape")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.2-1b")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=KINDS, help="dtypes of the cache")
    parser.add_argument("--packed-input-bits", type=int, choices=[8, 16], default=16)
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

"""What LoRA adapters cost: `python -m bench.lora` times decode steps of 16 rows with 16 adapters against base rows.

One model of a real shape with random weights, one executor; the same rows take turns, some steps with an adapter each
and some without any, so that a busy machine slows both. Every linear layer of the decoder has factors of `--rank`.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from bench.shapes import SHAPES, write_shape
from engine.executor.cpu import CPUExecutor
from engine.forward import ForwardInput, Limits
from engine.models.loading.adapted import AdaptedLayers, Heads
from engine.models.loading.load import load_model
from engine.models.parts.decoder import CausalLM
from engine.models.registry import read_spec
from engine.ops.lora import Branch, Factors

PAGE_SIZE = 16


def random_adapter(layers: AdaptedLayers, rank: int, seed: int) -> Any:
    """Factors for every linear layer of the decoder, as an executor takes them."""
    generator = torch.Generator().manual_seed(seed)
    by_site: dict[str, list[Factors]] = {}
    kept: dict[str, Any] = {}
    for place in layers.places.values():
        linear = place.linear
        if place.is_table or isinstance(linear, Heads) or linear.out_features == layers.spec.vocab_size:
            continue
        down = torch.randn((rank, linear.in_features), generator=generator) * linear.in_features**-0.5
        up = torch.randn((place.count, rank), generator=generator) * 0.01
        by_site.setdefault(place.site, []).append(Factors(place.first, down, up))
        kept[place.site] = linear
    branches = {
        site: Branch(kept[site].in_features, kept[site].out_features, factors) for site, factors in by_site.items()
    }
    return SimpleNamespace(branches=branches, num_bytes=sum(each.num_bytes for each in branches.values()))


class Steps:
    """Decode steps of `batch` rows on an executor, whose slots may change their adapters between steps."""

    def __init__(self, executor: CPUExecutor, batch: int, context: int) -> None:
        self._executor, self._batch = executor, batch
        self._position, self._number = context, 0
        self._pages = np.arange(1, executor.limits.num_pages + 1, dtype=np.int32).reshape(batch, -1)
        self._fresh = True

    async def run(self, adapters: np.ndarray[Any, Any] | None, loads: list[tuple[int, Any]] | None = None) -> float:
        """Seconds of one step. adapters: int32 [batch], the slots' from now on; None for those that they have."""
        executor, batch = self._executor, self._batch
        staging, limits = executor.staging[self._number % 2], executor.limits
        slots = np.arange(1, batch + 1)
        staging.row_slot[:batch] = slots
        staging.row_start[:batch] = self._position
        staging.row_len[:batch] = 1
        staging.row_samples[:batch] = True
        staging.token_ids[:batch] = 5 + np.arange(batch)
        staging.qo_indptr[: batch + 1] = np.arange(batch + 1)
        diffs = 0
        if self._fresh:
            diffs, self._fresh = self._pages.size, False
            staging.reserve_table_diff(diffs)
            places = slots[:, None] * limits.max_pages_per_seq + np.arange(self._pages.shape[1])
            staging.table_index[:diffs], staging.table_page[:diffs] = places.ravel(), self._pages.ravel()
        changed = 0
        if adapters is not None:
            changed = batch
            staging.sampling_slot[:batch] = slots
            staging.sampling["temperature"][:batch] = 0.0
            staging.sampling["top_p"][:batch] = 1.0
            staging.adapter[:batch] = adapters
        step = ForwardInput(self._number, staging, batch, batch, batch, diffs, changed, adapter_loads=loads or [])
        began = time.perf_counter()
        await executor.wait(executor.submit(step))
        self._number += 1
        self._position += 1
        return time.perf_counter() - began


async def measure(model: CausalLM, args: argparse.Namespace) -> None:
    assert isinstance(model.adapted, AdaptedLayers)
    batch, length = args.batch, args.context + (args.warmup + 2 * args.steps) * args.repeat + 8
    pages = -(-length // PAGE_SIZE)
    limits = Limits(
        batch,
        batch,
        pages * PAGE_SIZE,
        PAGE_SIZE,
        batch * pages,
        model.config.vocab_size,
        max_adapters=args.adapters,
    )
    executor = CPUExecutor(model, limits, dtype=getattr(torch, args.dtype))
    adapters = [random_adapter(model.adapted, args.rank, seed) for seed in range(args.adapters)]
    loads = list(enumerate(adapters, 1))
    size = sum(each.num_bytes for each in adapters)
    held = f"{args.adapters} adapters of rank {args.rank} ({size / 1e6:.0f} MB)"
    print(f"{args.shape} in {args.dtype}: {batch} rows, {held}")
    steps = Steps(executor, batch, args.context)
    own = (np.arange(batch) % args.adapters + 1).astype(np.int32)
    nobody = np.zeros(batch, np.int32)
    await steps.run(own, loads)
    ratios = []
    for _ in range(args.repeat):
        medians = []
        for ids in (nobody, own):
            await steps.run(ids)
            medians.append(statistics.median([await steps.run(None) for _ in range(args.steps)]))
        ratios.append(medians[1] / medians[0])
        base, adapted = (1e3 * each for each in medians)
        print(f"base {base:8.2f} ms, adapters {adapted:8.2f} ms a step: {ratios[-1]:.3f}", flush=True)
    print(f"median of {len(ratios)} pairs: {statistics.median(ratios):.3f}")
    executor.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.2-1b", choices=sorted(SHAPES))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5, help="pairs")
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        write_shape(args.shape, Path(folder))
        model = load_model(
            read_spec(Path(folder)),
            Path(folder),
            dtype=getattr(torch, args.dtype),
            device=torch.device("cpu"),
            load_format="dummy",
            max_model_len=4096,
            max_adapters=args.adapters,
        )
        asyncio.run(measure(model, args))


if __name__ == "__main__":
    main()

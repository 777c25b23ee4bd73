"""What LoRA adapters cost. `python -m bench.lora` times decode steps of 16 rows with 16 adapters against base rows;
`python -m bench.lora zipf` the goodput of requests whose adapters, of 1,000 on disk, follow Zipf's law.

One model of a real shape with random weights. The same rows, or requests, take turns with adapters and without any, so
that a busy machine slows both. Steps: every linear layer of the decoder has factors of `--rank`. Zipf: q and v have.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from bench.shapes import SHAPES, write_shape
from engine.build import build_engine
from engine.config import CacheOptions, EngineConfig, LoraOptions, ModelOptions, SchedulerOptions
from engine.executor.cpu import CPUExecutor
from engine.forward import ForwardInput, Limits
from engine.models.loading.adapted import AdaptedLayers, Heads
from engine.models.loading.load import load_model
from engine.models.parts.decoder import CausalLM
from engine.models.registry import read_spec
from engine.models.spec import ModelSpec
from engine.ops.lora import Branch, Factors
from engine.request import Request, SamplingParams

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
    batch, length = args.batch, args.context + 2 * (args.steps + 1) * args.repeat + 8
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


def write_adapters(folder: Path, model: ModelSpec, count: int, rank: int) -> None:
    """Directories a0, a1 and so on as peft writes them: factors of q and v in every layer, no two of them alike."""
    attention = model.attention
    assert attention is not None
    rows = {"q_proj": attention.num_heads * attention.head_dim, "v_proj": attention.num_kv_heads * attention.head_dim}
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(rows)}
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        tensors = {}
        for layer in range(model.num_layers):
            for name, out in rows.items():
                for end, shape in (("A", (rank, model.hidden_size)), ("B", (out, rank))):
                    key = f"base_model.model.model.layers.{layer}.self_attn.{name}.lora_{end}.weight"
                    tensors[key] = torch.randn(shape, generator=generator) * 0.02
        directory = folder / f"a{number}"
        directory.mkdir(parents=True)
        (directory / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, directory / "adapter_model.safetensors")


async def serve(engine: Any, names: list[str | None], args: argparse.Namespace, seed: int) -> float:
    """Tokens per second of one request for each name, `--concurrency` of them at a time."""
    generator = np.random.default_rng(seed)
    waiting = list(enumerate(names))
    params = SamplingParams(max_tokens=args.output_len, temperature=0.0, ignore_eos=True)

    async def work() -> None:
        while waiting:
            number, name = waiting.pop(0)
            prompt = generator.integers(3, 1000, args.input_len).tolist()
            adapter = None
            if name is not None:
                assert engine.adapters is not None
                adapter = await engine.adapters.get(name)
            async with engine.submit(Request(f"{seed}-{number}", prompt, params, adapter=adapter)) as stream:
                assert (await stream.collect()).error is None

    began = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(args.concurrency)))
    tokens: int = len(names) * args.output_len
    return tokens / (time.perf_counter() - began)


async def measure_zipf(engine: Any, args: argparse.Namespace) -> None:
    task = asyncio.create_task(engine.run())
    assert engine.adapters is not None
    shares = 1 / np.arange(1, args.count + 1)
    draw = np.random.default_rng(0)
    ratios = []
    for turn in range(args.repeat):
        chosen = draw.choice(args.count, args.requests, p=shares / shares.sum())
        base = await serve(engine, [None] * args.requests, args, 2 * turn)
        before = engine.adapters.num_reads
        adapted = await serve(engine, [f"a{number}" for number in chosen], args, 2 * turn + 1)
        ratios.append(adapted / base)
        told = f"base {base:7.1f} tok/s, adapters {adapted:7.1f} tok/s, {engine.adapters.num_reads - before} read"
        print(f"{told} for {args.requests} requests: {ratios[-1]:.3f}", flush=True)
    print(f"median of {len(ratios)} pairs: {statistics.median(ratios):.3f}")
    task.cancel()
    await asyncio.wait({task})


def run_zipf(args: argparse.Namespace) -> None:
    """See the module."""
    with tempfile.TemporaryDirectory() as scratch:
        path = write_shape(args.shape, Path(scratch) / args.shape)
        spec = read_spec(path)
        write_adapters(Path(scratch) / "adapters", spec, args.count, args.rank)
        length = args.input_len + args.output_len + 1
        config = EngineConfig(
            model=ModelOptions(path=str(path), dtype=args.dtype, load_format="dummy", max_model_len=length),
            cache=CacheOptions(num_pages=2 * args.concurrency * -(-length // PAGE_SIZE)),
            scheduler=SchedulerOptions(max_num_seqs=args.concurrency),
            lora=LoraOptions(
                enable=True, max_loras=args.resident, max_cpu_loras=args.resident, root=str(Path(scratch) / "adapters")
            ),
            device="cpu",
            num_threads=args.threads,
        )
        built = build_engine(config)
        asyncio.run(measure_zipf(built.engine, args))
        built.engine.executor.close()


def run_steps(args: argparse.Namespace) -> None:
    """See the module."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        path = write_shape(args.shape, Path(scratch) / args.shape)
        model = load_model(
            read_spec(path),
            path,
            dtype=getattr(torch, args.dtype),
            device=torch.device("cpu"),
            load_format="dummy",
            max_model_len=4096,
            max_adapters=args.adapters,
        )
        asyncio.run(measure(model, args))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.lora", description=__doc__)
    parser.add_argument("what", nargs="?", default="steps", choices=("steps", "zipf"))
    parser.add_argument("--shape", choices=sorted(SHAPES), help="llama-3.2-1b; of zipf smollm2-135m")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=5, help="pairs")
    parser.add_argument("--threads", type=int)
    steps = parser.add_argument_group("steps")
    steps.add_argument("--batch", type=int, default=16)
    steps.add_argument("--adapters", type=int, default=16)
    steps.add_argument("--context", type=int, default=128)
    steps.add_argument("--steps", type=int, default=5, help="of each kind in a pair")
    zipf = parser.add_argument_group("zipf")
    zipf.add_argument("--count", type=int, default=1000, help="adapters on disk")
    zipf.add_argument("--resident", type=int, default=32, help="adapters in memory and in steps")
    zipf.add_argument("--requests", type=int, default=256)
    zipf.add_argument("--concurrency", type=int, default=32)
    zipf.add_argument("--input-len", type=int, default=64)
    zipf.add_argument("--output-len", type=int, default=32)
    args = parser.parse_args()
    args.shape = args.shape or {"steps": "llama-3.2-1b", "zipf": "smollm2-135m"}[args.what]
    {"steps": run_steps, "zipf": run_zipf}[args.what](args)


if __name__ == "__main__":
    main()

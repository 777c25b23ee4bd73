"""The figures of one GPU: decode, prefill, overlap, HTTP, host time, start-up, kernels; `python -m bench.gpu`.

Planned to fit in 8 minutes, the most valuable figures first; every row is written to the JSON file at once, so a run
that is cut keeps what it had. Random weights of real shapes. Prints a table for the README at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.gpu_kernels import bench_attention, bench_experts, bench_kernels, bench_products
from bench.gpu_report import Report
from bench.server import running as running_server
from bench.shapes import SHAPES, write_shape
from engine.config import CacheOptions, EngineConfig, SchedulerOptions, StartupError
from engine.engine import Engine
from engine.executor.base import StepHandle
from engine.executor.cuda import CUDAExecutor
from engine.executor.cuda_device import CudaDevice, DeviceLayer
from engine.executor.cuda_kit import KIT_OF_BUILD, use_kit_of_build
from engine.executor.cuda_start import build_cuda_executor
from engine.executor.gpu_probe import obstacle_here
from engine.forward import ForwardInput, ForwardOutput
from engine.models.loading.load import load_model
from engine.models.parts.decoder import CausalLM
from engine.models.registry import read_spec
from engine.process import settle
from engine.request import Request, SamplingParams

# torch's stubs leave streams and events untyped.
cuda: Any = torch.cuda
CONTEXT = 1024
DECODE_TOKENS = 160
# Rows of a small, a middle and a large batch.
BATCHES = (1, 64, 256)
# What runs this module anew.
PYTHON = (sys.executable, "-m")
# Steps left out at the start of a measurement: graphs are captured, clocks rise.
WARM_STEPS = 24
# Full steps of prompts that a rate is taken over: 64 prompts of 1,024 tokens in steps of 8,192.
PREFILL_STEPS = 8


# ---- what the hardware can do


def copy_rate(device: torch.device, num_bytes: int = 2**32) -> float:
    """Bytes per second of a device-to-device copy, read and written."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * num_bytes / _seconds(device, lambda: target.copy_(source), 8)


def gemm_rate(device: torch.device, size: int = 8192) -> float:
    """Multiply-add operations per second, times two, of a bf16 matrix product on random data."""
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    return 2.0 * size**3 / _seconds(device, lambda: a @ b, 8)


def _seconds(device: torch.device, work: Callable[[], object], repeat: int) -> float:
    """Median of single runs."""

    def sync() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(3):
        work()
    times = []
    for _ in range(repeat):
        sync()
        begin = time.perf_counter()
        work()
        sync()
        times.append(time.perf_counter() - begin)
    return float(np.median(times))


class TimedDevice(CudaDevice):
    """Notes on the device when steps begin and end on the compute stream. `marks`: the executor's events."""

    def __init__(self) -> None:
        super().__init__()
        self.timing = False
        self.begins: set[int] = set()
        self.ends: set[int] = set()
        self.spans: list[tuple[Any, Any]] = []
        self._begin: Any = None

    def watch(self, executor: CUDAExecutor) -> None:
        self.begins = {id(side.uploaded) for side in executor._sides}
        self.ends = {id(side.computed) for side in executor._sides}

    def wait(self, event: Any) -> None:
        super().wait(event)
        if self.timing and id(event) in self.begins:
            self._begin = cuda.Event(enable_timing=True)
            self._begin.record()

    def record(self, event: Any) -> None:
        if self.timing and id(event) in self.ends and self._begin is not None:
            end = cuda.Event(enable_timing=True)
            end.record()
            self.spans.append((self._begin, end))
            self._begin = None
        super().record(event)

    def idle_share(self, last: int) -> float:
        """Of the last steps: the share of time between the end of one and the begin of the next."""
        self.synchronize_all()
        spans = self.spans[-last:]
        gaps = sum(a[1].elapsed_time(b[0]) for a, b in itertools.pairwise(spans))
        return float(gaps / spans[0][0].elapsed_time(spans[-1][1]))


# ---- one engine


class Watch:
    """Times of steps, as the loop sees them: (when it was waited for, when it was done, rows, decode only, tokens)."""

    def __init__(self, executor: CUDAExecutor) -> None:
        self.steps: list[tuple[float, float, int, bool, int]] = []
        self._kinds: dict[int, tuple[int, bool, int]] = {}
        self._executor, self._submit, self._wait = executor, executor.submit, executor.wait
        executor.submit = self.submit  # type: ignore[method-assign]
        executor.wait = self.wait  # type: ignore[method-assign]

    def submit(self, forward_input: ForwardInput) -> Any:
        rows = forward_input.num_rows
        self._kinds[forward_input.step] = (rows, forward_input.num_decode_rows == rows, forward_input.num_tokens)
        return self._submit(forward_input)

    async def wait(self, handle: StepHandle) -> ForwardOutput:
        begin = time.perf_counter()
        output = await self._wait(handle)
        self.steps.append((begin, time.perf_counter(), *self._kinds.pop(handle.step)))
        return output

    def remove(self) -> None:
        self._executor.submit, self._executor.wait = self._submit, self._wait  # type: ignore[method-assign]

    def steady(self, batch: int) -> tuple[float, float]:
        """Seconds per step, and of it those that the host worked, over the decode steps of the whole batch."""
        intervals, worked = [], []
        for before, step in itertools.pairwise(self.steps):
            if before[2:4] == step[2:4] == (batch, True):
                intervals.append(step[1] - before[1])
                worked.append(step[0] - before[1])
        intervals, worked = intervals[WARM_STEPS:], worked[WARM_STEPS:]
        if not intervals:
            raise RuntimeError(f"no steady decode steps of {batch} rows")
        return float(np.mean(intervals)), float(np.mean(worked))


class Subject:
    """A model on the device and the engines that are made around it."""

    def __init__(
        self,
        name: str,
        config: dict[str, object],
        layer: DeviceLayer,
        dtype: torch.dtype,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int = 8192,
        context: int = CONTEXT,
        decode_tokens: int = DECODE_TOKENS,
        kv_cache_dtype: str = "auto",
    ) -> None:
        self.name, self.layer, self.dtype = name, layer, dtype
        self.context, self.decode_tokens = context, decode_tokens
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder)
            (directory / "config.json").write_text(json.dumps(config))
            self.config = read_spec(directory)
            begin = time.perf_counter()
            self.model: CausalLM = load_model(
                self.config,
                directory,
                dtype=dtype,
                device=layer.device,
                load_format="dummy",
                max_model_len=context + decode_tokens + 1,
            )
            self.load_seconds = time.perf_counter() - begin
        self.max_num_seqs = max_num_seqs
        self.options: dict[str, Any] = {
            "dtype": dtype,
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": max_num_batched_tokens,
            "max_model_len": context + decode_tokens + 1,
            "kv_cache_dtype": kv_cache_dtype,
            "row": lambda name, text: print(f"  {name}: {text}", file=sys.stderr, flush=True),
        }
        self.num_pages = max_num_seqs * -(-(context + decode_tokens + 1) // 16) + 64
        self.rng = np.random.default_rng(0)

    def executor(self) -> CUDAExecutor:
        cache = CacheOptions(num_pages=self.num_pages, enable_prefix_caching=False)
        return build_cuda_executor(self.model, self.layer, cache, **self.options)

    def prompts(self, count: int, length: int) -> list[list[int]]:
        found: list[list[int]] = self.rng.integers(0, self.config.vocab_size, (count, length)).tolist()
        return found

    def idle_parameters(self, tokens: int) -> float:
        """Of experts that none of so many tokens is expected to choose."""
        idle = 0.0
        for experts in self.config.experts:
            unchosen = (1 - experts.num_experts_per_token / experts.num_experts) ** tokens
            idle += 3 * self.config.hidden_size * experts.intermediate_size * experts.num_experts * unchosen
        return idle

    def weight_bytes(self, batch: int) -> float:
        """What a decode step reads: all layers and the output head; of the embedding only rows."""
        head = self.config.vocab_size * self.config.hidden_size
        other = 0 if self.config.tie_word_embeddings else head
        return float((self.config.num_parameters - other - self.idle_parameters(batch)) * self.dtype.itemsize)

    def kv_bytes(self, tokens: float) -> float:
        return self.model.attention_spec.kv_bytes_per_token(self.dtype) * tokens

    def prefill_flops(self, tokens: int) -> float:
        config = self.config
        embeddings = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
        attention = 2.0 * config.num_layers * config.num_heads * config.head_dim * tokens**2
        return 2.0 * (config.num_parameters - embeddings - self.idle_parameters(1)) * tokens + attention


async def answer(engine: Engine, prompts: list[list[int]], tokens: int) -> None:
    """All prompts at once; nobody looks before the end, so no text and no wake-up per token."""
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)

    async def one(prompt: list[int], number: int) -> None:
        request = Request(f"{number}-{time.monotonic_ns()}", prompt, params, stream=False)
        async with engine.submit(request) as stream:
            await stream.collect()

    await asyncio.gather(*(one(prompt, number) for number, prompt in enumerate(prompts)))


@contextlib.asynccontextmanager
async def running(subject: Subject, executor: CUDAExecutor, overlap: bool) -> AsyncIterator[Engine]:
    """An engine at work. A new one counts its steps from 0; the executor looks at their parity alone."""
    config = EngineConfig(
        cache=CacheOptions(enable_prefix_caching=False),
        scheduler=SchedulerOptions(
            max_num_seqs=subject.max_num_seqs,
            max_num_batched_tokens=executor.limits.max_num_batched_tokens,
            overlap=overlap,
        ),
    )
    engine = Engine(config, executor, None)
    loop_task = asyncio.create_task(engine.run())
    try:
        yield engine
        await engine.drained()
    finally:
        loop_task.cancel()
        await asyncio.gather(loop_task, return_exceptions=True)


async def measure_decode(
    subject: Subject, executor: CUDAExecutor, batch: int, *, overlap: bool = True
) -> tuple[float, float]:
    """Seconds per decode step of `batch` rows, and of it those of the host."""
    watch = Watch(executor)
    try:
        async with running(subject, executor, overlap) as engine:
            await answer(engine, subject.prompts(batch, subject.context), subject.decode_tokens)
    finally:
        watch.remove()
    return watch.steady(batch)


async def measure_prefill(subject: Subject, executor: CUDAExecutor) -> tuple[float, float]:
    """Prompt tokens per second over several full steps, and seconds from a step's worth of prompts to their tokens.

    Rates count from the first step's end to the last one's: what the host needs before the first and after the last is
    no part of a steady rate, and is in the second figure.
    """
    budget = executor.limits.max_num_batched_tokens
    per_step = max(1, budget // subject.context)
    count = PREFILL_STEPS * per_step
    watch = Watch(executor)
    try:
        async with running(subject, executor, True) as engine:
            await answer(engine, subject.prompts(count, subject.context), 1)
            watch.steps.clear()
            await answer(engine, subject.prompts(count, subject.context), 1)
            ends = [(end, tokens) for _, end, _, _, tokens in watch.steps]
            begin = time.perf_counter()
            await answer(engine, subject.prompts(per_step, subject.context), 1)
            once = time.perf_counter() - begin
    finally:
        watch.remove()
    return sum(tokens for _, tokens in ends[1:]) / (ends[-1][0] - ends[0][0]), once


def measure_small_step(executor: CUDAExecutor, rows: int, length: int) -> tuple[float, float | None]:
    """Seconds that the host needs to launch a step with prompts, and the device to run it (None where untimed).

    Such a step has no graph. The device is kept busy until all of it is launched, so its own time has no gaps.
    """
    layer, host, device = executor.layer, [], []

    async def run() -> None:
        for number in range(12):
            step = executor.prompt_step(number, rows, length)
            if isinstance(layer, TimedDevice):
                layer.timing = True
                layer.spans.clear()
                with layer.on(executor._compute):
                    cuda._sleep(50_000_000)  # some 25 ms
            begin = time.perf_counter()
            handle = executor.submit(step)
            host.append(time.perf_counter() - begin)
            await executor.wait(handle)
            if isinstance(layer, TimedDevice):
                device.append(layer.spans[-1][0].elapsed_time(layer.spans[-1][1]) / 1e3)
                layer.timing = False

    asyncio.run(run())
    return float(np.median(host[4:])), float(np.median(device[4:])) if device else None


def bench_model(report: Report, subject: Subject, batches: Sequence[int], bandwidth: float, flops: float) -> None:
    """Decode at every batch size, prefill, then what explains them."""
    with subject.layer.may_block():
        executor = subject.executor()
    if isinstance(subject.layer, TimedDevice):
        subject.layer.watch(executor)
    settle()  # as a server does: a full collection would stand in for some hundred steps
    name, context = subject.name, subject.context
    report.add("load, random weights", subject.load_seconds, "s", model=name)
    steps: dict[int, float] = {}
    for batch in batches:
        interval, worked = asyncio.run(measure_decode(subject, executor, batch))
        steps[batch] = interval
        tokens = batch * (context + subject.decode_tokens / 2)
        floor = (subject.weight_bytes(batch) + subject.kv_bytes(tokens)) / bandwidth
        common: dict[str, Any] = {"model": name, "batch": batch, "context": context}
        report.add("decode", batch / interval, "tok/s", floor_ratio=floor / interval, **common)
        report.add("host time per decode step", 1e6 * worked, "us", **common)
    rate, once = asyncio.run(measure_prefill(subject, executor))
    floor = subject.prefill_flops(context) / flops / context
    per_step = max(1, executor.limits.max_num_batched_tokens // context)
    prompts = PREFILL_STEPS * per_step
    report.add("prefill", rate, "tok/s", model=name, batch=prompts, context=context, floor_ratio=rate * floor)
    report.add("prompts to first tokens", 1e3 * once, "ms", model=name, batch=per_step, context=context)
    middle = [batch for batch in batches if batch > 1]
    if isinstance(subject.layer, TimedDevice) and middle:
        subject.layer.timing = True
        subject.layer.spans.clear()
        asyncio.run(measure_decode(subject, executor, middle[0]))
        share = subject.layer.idle_share(subject.decode_tokens // 2)
        subject.layer.timing = False
        report.add("GPU idle between steps", 100 * share, "%", model=name, batch=middle[0], context=context)
    for batch in middle:
        interval, _ = asyncio.run(measure_decode(subject, executor, batch, overlap=False))
        report.add("overlap on over off", interval / steps[batch], "x", model=name, batch=batch, context=context)
    # Whether graphs for small steps with prompts would pay: they do where the host needs longer than the device.
    for rows in {min(rows, subject.max_num_seqs) for rows in (1, 16)}:
        length = min(16, context)
        launch, ran = measure_small_step(executor, rows, length)
        report.add("host launch, small prompt step", 1e6 * launch, "us", model=name, batch=rows, context=length)
        if ran is not None:
            report.add("device time, small prompt step", 1e6 * ran, "us", model=name, batch=rows, context=length)
    executor.close()


# ---- start-up


def bench_start(report: Report, shape: str) -> None:
    """From the start of a process to its first token, weights from the page cache."""
    from safetensors.torch import save_file

    from engine.models.loading.weights import ShapeRecorder

    with tempfile.TemporaryDirectory() as folder:
        directory = write_shape(shape, Path(folder) / shape)
        config = read_spec(directory)
        from engine.models.parts.decoder import Decoder

        recorder = ShapeRecorder(torch.bfloat16)
        Decoder(config, recorder, 2048)
        tensors = {name: torch.zeros(size, dtype=torch.bfloat16) for name, size in recorder.shapes.items()}
        save_file(tensors, directory / "model.safetensors")
        del tensors
        begin = time.perf_counter()
        command = [*PYTHON, "bench.gpu", "--first-token", str(directory)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if done.returncode != 0:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        report.add("start to first token", time.perf_counter() - begin, "s", model=shape)


def first_token(directory: Path) -> None:
    """The child of `bench_start`: load, answer one token."""
    layer = CudaDevice()
    config = read_spec(directory)
    model = load_model(config, directory, dtype=torch.bfloat16, device=layer.device, max_model_len=8192)
    executor = build_cuda_executor(
        model,
        layer,
        CacheOptions(),
        dtype=torch.bfloat16,
        max_num_seqs=256,
        max_num_batched_tokens=8192,
        max_model_len=8192,
    )

    async def run() -> None:
        engine = Engine(EngineConfig(), executor, None)
        loop_task = asyncio.create_task(engine.run())
        await answer(engine, [[1, 2, 3, 4]], 1)
        loop_task.cancel()
        await asyncio.gather(loop_task, return_exceptions=True)

    asyncio.run(run())


# ---- over HTTP


def write_words(directory: Path, vocab_size: int) -> None:
    """A tokenizer.json whose every id is a word of its own, so that random ids make text as real ones do."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    tokenizer = Tokenizer(WordLevel({f"w{number}": number for number in range(vocab_size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))


def kit_flags() -> str:
    """For a server: the kit that this process has taken."""
    has_kit = torch.cuda.is_available() and KIT_OF_BUILD.exists()
    return f"--kernels {KIT_OF_BUILD}" if has_kit else ""


def bench_http(report: Report, shape: str, batches: Sequence[int] = BATCHES[1:], flags: str = "") -> None:
    """Output tokens per second of a server with random weights, and how much of it overlap brings.

    The server needs all packages of pyproject.toml; where one is missing this section says which and ends.
    """
    from bench.compare import one_round

    rates: dict[tuple[int, bool], float] = {}
    with tempfile.TemporaryDirectory() as folder:
        directory = write_shape(shape, Path(folder) / shape)
        vocab_size = SHAPES[shape]["vocab_size"]
        assert isinstance(vocab_size, int)
        write_words(directory, vocab_size)
        for overlap in (True, False):
            more = "" if overlap else " --disable-overlap"
            with running_server(
                f"--model {directory} --load-format dummy --max-model-len 2048 {kit_flags()} {flags}{more}"
            ) as server:
                for batch in batches:
                    load = f"--random-input-len 128 --random-output-len 256 --ignore-eos --num-prompts {2 * batch}"
                    words = [*load.split(), "--max-concurrency", str(batch)]
                    one_round(server, words, 0)  # captures graphs
                    rate = rates[batch, overlap] = one_round(server, words, 1)["output_throughput"]
                    common: dict[str, Any] = {"model": shape, "batch": batch, "context": 128}
                    if overlap:
                        report.add("HTTP, output", rate, "tok/s", **common)
                    else:
                        report.add("HTTP, overlap on over off", rates[batch, True] / rate, "x", **common)


def run_all(report: Report, layer: TimedDevice, only: Sequence[str] = ()) -> list[str]:
    """Sections in the order of their worth, or some of them; one that fails is told and the next begins.

    Returns those that are left where an error has cost the device: another process can have it.
    """
    bandwidth = copy_rate(layer.device)
    report.add("copy bandwidth", bandwidth / 1e12, "TB/s")
    flops = gemm_rate(layer.device)
    report.add("bf16 matrix product", flops / 1e12, "TFLOP/s")

    def one_model(shape: str, batches: Sequence[int], **options: Any) -> Callable[[], None]:
        def section() -> None:
            subject = Subject(shape, SHAPES[shape], layer, torch.bfloat16, max_num_seqs=max(batches), **options)
            bench_model(report, subject, batches, bandwidth, flops)

        return section

    sections: list[tuple[str, float, Callable[[], None]]] = [
        ("Llama-3.2-1B", 60, one_model("llama-3.2-1b", BATCHES)),
        ("Llama-3.1-8B", 90, one_model("llama-3.1-8b", BATCHES)),
        ("start", 30, lambda: bench_start(report, "llama-3.2-1b")),
        ("attention", 20, lambda: bench_attention(report, layer, bandwidth)),
        ("products", 20, lambda: bench_products(report, layer, bandwidth)),
        ("experts", 10, lambda: bench_experts(report, layer, bandwidth, flops)),
        ("HTTP", 90, lambda: bench_http(report, "llama-3.2-1b", BATCHES[1:])),
        ("Qwen3-30B-A3B", 60, one_model("qwen3-30b-a3b", BATCHES[:2])),
        ("kernels", 30, lambda: bench_kernels(report, layer, bandwidth)),
        ("fp8 KV", 45, one_model("llama-3.1-8b", BATCHES[-1:], kv_cache_dtype="fp8")),
    ]
    sections = [each for each in sections if not only or each[0] in only]
    for number, (name, seconds, section) in enumerate(sections):
        if not report.has_time(seconds):
            print(f"no time is left for: {name}", file=sys.stderr)
            continue
        try:
            section()
        except Exception as error:
            print(f"{name} failed: {type(error).__name__}: {error}", file=sys.stderr)
            if layer.is_lost(error) or layer.is_lost(error.__cause__ or error):
                return [each[0] for each in sections[number + 1 :]]
        gc.unfreeze()
        gc.collect()
        torch.cuda.empty_cache()
    return []


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the JSON file")
    parser.add_argument("--seconds", type=float, default=460.0, help="no section begins that would not end in time")
    parser.add_argument("--only", nargs="+", default=[], metavar="SECTION", help="as they are named in this file")
    parser.add_argument("--first-token", type=Path, metavar="DIR", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(f"bench.gpu needs an NVIDIA GPU: {obstacle_here(torch.version.cuda)}", file=sys.stderr)
        return 1
    try:
        kernels = use_kit_of_build()
    except StartupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.first_token is not None:
        first_token(args.first_token)
        return 0
    print(f"kernels: {kernels or 'as FlashInfer finds or builds them'}", file=sys.stderr)
    layer = TimedDevice()
    report = Report(args.out, args.seconds, torch.cuda.get_device_name(layer.device))
    left = run_all(report, layer, args.only)
    print(f"\n{report.table()}\n\nwritten to {report.path}", flush=True)
    if left:
        # What the lost device holds goes with this process alone, so that the other takes its place.
        seconds = str(round(report.deadline - time.monotonic()))
        words = [*PYTHON, "bench.gpu", "--out", str(args.out), "--seconds", seconds, "--only", *left]
        os.execv(words[0], words)
    return 0


if __name__ == "__main__":
    sys.exit(main())
